"""Pictures show what was recorded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import simba
from conftest import tokens
from simba import plots
from simba.errors import InputError
from simba.evaluate import ContextCell

WORDS = [f"w{i} " for i in range(60)]


@pytest.fixture
def run(model):
    simba.sparsify(model, 0.2)
    with torch.no_grad(), simba.record(model) as run:
        model(tokens(1, 60), prompt_length=55)
    return run


def shades(axes):
    """Brightness of each token's background, 1 for white, and where it stands."""
    (boxes,) = axes.collections
    return {
        tuple(path.vertices.min(0).round(3)): color[:3].mean()
        for path, color in zip(boxes.get_paths(), boxes.get_facecolor(), strict=True)
    }


@pytest.mark.parametrize("layer", [0, 2])
def test_heatmap_is_darkest_where_the_score_is_highest(run, layer):
    figure = plots.heatmap(run, WORDS, layer)
    (axes,) = figure.axes
    scored = {
        column: score
        for column, score in zip(
            run.positions[layer][0].tolist(), run.scores[layer][0].tolist(), strict=True
        )
        if score == score
    }
    assert len(scored) == (55 if layer == 0 else 26)  # neither the answer's five nor the pruned
    by_place = shades(axes)
    assert len(by_place) == 60
    places = sorted(by_place, key=lambda place: (place[1], place[0]))  # reading order
    brightness = [by_place[place] for place in places]
    for column in range(60):
        assert (brightness[column] == 1) == (column not in scored)
    order = sorted(scored, key=scored.get)
    assert all(brightness[a] >= brightness[b] for a, b in itertools.pairwise(order))
    assert brightness[order[0]] > brightness[order[-1]] + 0.3
    written = "".join(text.get_text() for text in axes.texts).replace(" ", "")
    assert written == "".join(WORDS).replace(" ", "")


def test_heatmap_grows_with_the_text_and_the_trapezoid_does_not(model):
    long = [f"word {i}, " for i in range(300)]
    simba.sparsify(model, 0.2)
    with torch.no_grad(), simba.record(model) as run:
        model(tokens(1, 300))
    assert plots.heatmap(run, long).get_figheight() > 4
    figure = plots.trapezoid(run, long)
    where, counts, text = figure.axes
    assert where.images[0].get_array().shape == (4, 300)
    bars: list[Any] = counts.patches
    assert [bar.get_width() for bar in bars] == [300, 220, 140, 60]
    assert min(place[1] for place in shades(text)) == 0  # the last lines only, from the top
    assert max(place[1] for place in shades(text)) == 10


def test_pictures_of_nothing(run):
    for picture in (plots.heatmap, plots.trapezoid):
        with pytest.raises(InputError, match="59 tokens of text"):
            picture(run, WORDS[:-1])
        with pytest.raises(InputError, match="nothing was recorded"):
            picture(type(run)(), WORDS)
    with pytest.raises(InputError, match="layers 0 to 3"):
        plots.heatmap(run, WORDS, 4)


def test_contexts_tell_many_models_apart():
    """By colour and line, which are those of the legend in both panels."""
    rules = ["dense", *(f"recency@write:0.{i}@0:0.4" for i in range(1, 7))]
    cells = [
        ContextCell(context, rule, keep, 10, 1.0, (1.0, 2.0))
        for context in (64, 128)
        for rule in rules
        for keep in ((1.0,) if rule == "dense" else (0.3, 0.1))
    ]
    styles = [
        [(line.get_color(), line.get_linestyle()) for line, *_ in axes.containers]
        for axes in plots.contexts(cells).axes
    ]
    assert len(set(styles[0])) == 13 and styles[1] == styles[0][1:]


def test_contexts_without_their_dense_model():
    """Of a run that was stopped, or of a file that lost a cell: what is there is drawn."""
    cells = [
        ContextCell(context, criterion, keep, 10, 1.0, (1.0, 2.0))
        for context, criterion, keep in ((8, "dense", 1.0), (8, "delta", 0.5), (16, "delta", 0.5))
    ]
    left, right = plots.contexts(cells).axes
    assert list(left.containers[1][0].get_xdata()) == [8, 16]
    assert list(right.containers[0][0].get_xdata()) == [8]
