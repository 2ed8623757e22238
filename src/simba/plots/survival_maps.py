"""Pictures of what pruning does (needs the extra ``plot``: pip install "simba-ssm[plot]")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simba.errors import InputError
from simba.introspection import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def survival(recording: Recording, row: int = 0) -> Tensor:
    """(K, num_layers) bool: whether layer l processed column k of the recorded input."""
    if not recording.positions:
        raise InputError("nothing was recorded: run the model inside `with simba.record(model)`")
    length = recording.positions[0].shape[1]
    alive = torch.zeros(length, len(recording.positions), dtype=torch.bool)
    for layer, positions in enumerate(recording.positions):
        kept = positions[row].cpu()
        alive[kept[kept >= 0], layer] = True
    return alive


SHADES = 10
COLUMNS, LAST_LINES = 150, 11
"""Of the written text: characters a line, and lines of the trapezoid's."""


def trapezoid(recording: Recording, tokens: Sequence[str], row: int = 0) -> Figure:
    """Which tokens survive to which layer: over all positions, and over the text's end.

    Args:
        recording: of a forward pass (see `simba.record`).
        tokens: the text of each token of the input.
        row: of the batch.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.

    Raises:
        InputError: nothing was recorded, or ``tokens`` are not as many as the input's.
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
    where.set(xlabel="position in the prompt", ylabel="layer", title="who survives to which layer")
    counts.barh(range(num_layers), alive.sum(0).tolist(), color=palette(num_layers), height=1.0)
    counts.set(xlabel="tokens", title="the trapezoid", ylim=(-0.5, num_layers - 0.5), yticks=[])
    for axes in (where, counts):
        axes.spines[["top", "right"]].set_visible(False)
    _write_text(text, _lay_out(tokens, LAST_LINES), depth.tolist(), palette)
    text.set_title("the end of the text: the darker, the more layers the token reaches")
    return figure


def heatmap(recording: Recording, tokens: Sequence[str], layer: int = 0, row: int = 0) -> Figure:
    """The text, each token the darker the higher its score in one layer.

    Colours are ranks, in ten steps from the lowest tenth of the layer's tokens to the highest: the
    scores themselves span many orders of magnitude. Tokens without a score are white: those that
    are not in the layer any more, and those behind the prompt.

    Args:
        recording: of a forward pass (see `simba.record`).
        tokens: the text of each token of the input.
        layer: whose scores.
        row: of the batch.

    Returns:
        A matplotlib figure, as high as the text is long.

    Raises:
        InputError: nothing was recorded, no such layer, or ``tokens`` are not as many as the
            input's.
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
    axes.set_title(f"layer {layer}: the darker, the higher the score; white: gone or not scored")
    return figure


def _palette(levels: int) -> Any:
    """White for gone, light to dark for the number of layers reached."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    base = colormaps["YlGnBu"]
    shades = [(1.0, 1.0, 1.0, 1.0), *(base(0.12 + 0.83 * i / levels) for i in range(1, levels + 1))]
    return ListedColormap(shades)


@dataclass(frozen=True)
class _Placed:
    """A token of the written text."""

    index: int
    line: int
    column: int
    text: str


def _lay_out(tokens: Sequence[str], lines: int | None = None) -> list[_Placed]:
    """The tokens in lines of ``COLUMNS`` characters; only the last ``lines`` of them if given."""
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


def _write_text(axes: Axes, cells: Sequence[_Placed], shades: Sequence[int], palette: Any) -> None:
    """Text in a fixed-width font, each token on its shade; ``shades`` are by index of token."""
    lines = max(1 + cells[-1].line, LAST_LINES)
    axes.set(xlim=(0, COLUMNS), ylim=(lines, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    most = palette.N - 1
    for cell in cells:
        y, shade, width = cell.line, shades[cell.index], len(cell.text)
        axes.fill_between(
            [cell.column, cell.column + width], y, y + 0.92, color=palette(shade), lw=0
        )
        color = "white" if shade > 0.6 * most else "black"
        for i, character in enumerate(cell.text):
            axes.text(
                cell.column + i + 0.5,
                y + 0.48,
                character.replace("$", r"\$"),
                ha="center",
                va="center",
                color=color,
                family="monospace",
                fontsize=7,
            )
