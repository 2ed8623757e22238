"""Figures of a recorded forward pass: which tokens survive, and which score high.

They need the extra ``plot``: pip install "simba-ssm[plot]".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simba.errors import InputError
from simba.introspection import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure


def survival(recording: Recording, row: int = 0) -> Tensor:
    """Which layer processed which token.

    Args:
        recording: of a forward pass (see `simba.record`).
        row: of the batch.

    Returns:
        (seq_len, num_layers) bool: whether layer l processed column k of the input.

    Raises:
        InputError: nothing was recorded.
    """
    if not recording.positions:
        raise InputError("nothing was recorded: run the model inside `with simba.record(model)`")
    length = recording.positions[0].shape[1]
    alive = torch.zeros(length, len(recording.positions), dtype=torch.bool)
    for layer, positions in enumerate(recording.positions):
        kept = positions[row].cpu()
        alive[kept[kept >= 0], layer] = True
    return alive


SHADES = 10
"""Steps of the heatmap's colours."""

COLUMNS, LAST_LINES = 150, 11
"""Characters per line of the text, and lines of text below the trapezoid."""


def trapezoid(recording: Recording, tokens: Sequence[str], row: int = 0) -> Figure:
    """Draw which tokens survive to which layer, for all positions and for the end of the text.

    Args:
        recording: of a forward pass (see `simba.record`).
        tokens: the text of each token of the input.
        row: of the batch.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.

    Raises:
        InputError: nothing was recorded, or the number of ``tokens`` is not that of the input.
    """
    from matplotlib.figure import Figure

    alive = survival(recording, row)
    length, num_layers = alive.shape
    if len(tokens) != length:
        raise InputError(f"{len(tokens)} tokens of text for an input of {length}")
    figure = Figure(figsize=(12, 7.2), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[5, 1], height_ratios=[3, 2])
    where, counts = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    text = figure.add_subplot(grid[1, :])

    depth = alive.sum(1)  # layers that processed each token
    shade = torch.where(alive, depth[:, None], 0).T.numpy()
    palette = _palette(num_layers)
    where.imshow(
        shade,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=palette,
        vmin=0,
        vmax=num_layers,
    )
    where.set(
        xlabel="position in the prompt", ylabel="layer", title="which tokens survive to which layer"
    )
    counts.barh(range(num_layers), alive.sum(0).tolist(), color=palette(num_layers), height=1.0)
    counts.set(xlabel="tokens", title="the trapezoid", ylim=(-0.5, num_layers - 0.5), yticks=[])
    for axes in (where, counts):
        axes.spines[["top", "right"]].set_visible(False)
    _write_text(text, _lay_out(tokens, LAST_LINES), depth.tolist(), palette)
    text.set_title("the end of the text: the darker, the more layers the token reaches")
    return figure


def heatmap(recording: Recording, tokens: Sequence[str], layer: int = 0, row: int = 0) -> Figure:
    """Draw the text, with a darker background for tokens with a higher score in one layer.

    The scores span many orders of magnitude, so colours show ranks: ten steps, from the lowest
    tenth of the layer's tokens to the highest. Tokens without a score are white: those that were
    dropped before the layer, and those after the prompt.

    Args:
        recording: of a forward pass (see `simba.record`).
        tokens: the text of each token of the input.
        layer: index of the layer whose scores are drawn.
        row: of the batch.

    Returns:
        A matplotlib figure whose height grows with the text.

    Raises:
        InputError: nothing was recorded, there is no such layer, or the number of ``tokens`` is not
            that of the input.
    """
    from matplotlib.figure import Figure

    alive = survival(recording, row)
    length, num_layers = alive.shape
    if len(tokens) != length:
        raise InputError(f"{len(tokens)} tokens of text for an input of {length}")
    if not 0 <= layer < num_layers:
        raise InputError(f"the model has layers 0 to {num_layers - 1}, not {layer}")
    scores, positions = recording.scores[layer][row].cpu(), recording.positions[layer][row].cpu()
    scored = (positions >= 0) & ~scores.isnan()
    rank = scores[scored].argsort(stable=True).argsort()
    step = 1 + rank * SHADES // max(len(rank), 1)
    shade = torch.zeros(length, dtype=torch.int64).index_copy(0, positions[scored], step)

    cells = _lay_out(tokens)
    lines = 1 + cells[-1].line
    figure = Figure(figsize=(12, 0.7 + 0.22 * lines), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _write_text(axes, cells, shade.tolist(), _palette(SHADES))
    axes.set_title(f"layer {layer}: the darker, the higher the score; white: dropped or not scored")
    return figure


def _palette(levels: int) -> ListedColormap:
    """White for level 0, then from light to dark."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    base = colormaps["YlGnBu"]
    shades = [(1.0, 1.0, 1.0, 1.0), *(base(0.12 + 0.83 * i / levels) for i in range(1, levels + 1))]
    return ListedColormap(shades)


@dataclass(frozen=True)
class _Placed:
    """A token and its place in the written text."""

    index: int
    line: int
    column: int
    text: str


def _lay_out(tokens: Sequence[str], lines: int | None = None) -> list[_Placed]:
    """Arrange the tokens in lines of ``COLUMNS`` characters; keep the last ``lines`` if given."""
    cells: list[_Placed] = []
    line, column = 0, 0
    for index, token in enumerate(tokens):
        shown = " ".join(token.replace("\n", " ").split("\t"))
        if column + len(shown) > COLUMNS:
            line, column = line + 1, 0
        cells.append(_Placed(index, line, column, shown))
        column += len(shown)
    first = 0 if lines is None else max(line + 1 - lines, 0)
    return [replace(cell, line=cell.line - first) for cell in cells if cell.line >= first]


def _write_text(
    axes: Axes, cells: Sequence[_Placed], shades: Sequence[int], palette: ListedColormap
) -> None:
    """Write the tokens in a fixed-width font; ``shades`` has each token's level in the palette."""
    from matplotlib.collections import PolyCollection

    lines = max(1 + cells[-1].line, LAST_LINES)
    axes.set(xlim=(0, COLUMNS), ylim=(lines, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    levels = [shades[cell.index] for cell in cells]
    boxes = PolyCollection([_box(cell) for cell in cells], facecolors=palette(levels), lw=0)
    axes.add_collection(boxes, autolim=False)
    for cell, level in zip(cells, levels, strict=True):
        color = "white" if level > 0.6 * (palette.N - 1) else "black"
        for i, character in enumerate(cell.text):
            if character != " ":
                axes.text(
                    cell.column + i + 0.5,
                    cell.line + 0.48,
                    character.replace("$", r"\$"),
                    ha="center",
                    va="center",
                    color=color,
                    family="monospace",
                    fontsize=7,
                    in_layout=False,  # the axes hold it: measuring each character takes long
                )


def _box(cell: _Placed) -> list[tuple[float, float]]:
    """The corners of the background of a token."""
    left, right, top, bottom = (
        cell.column,
        cell.column + len(cell.text),
        cell.line,
        cell.line + 0.92,
    )
    return [(left, top), (right, top), (right, bottom), (left, bottom)]
