"""Pictures of what pruning does (needs the extra ``plot``: pip install "simba-ssm[plot]")."""

from __future__ import annotations

from collections.abc import Sequence
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
    _write_text(text, tokens, depth.tolist(), palette)
    return figure


def _palette(levels: int) -> Any:
    """White for gone, light to dark for the number of layers reached."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    base = colormaps["YlGnBu"]
    shades = [(1.0, 1.0, 1.0, 1.0), *(base(0.12 + 0.83 * i / levels) for i in range(1, levels + 1))]
    return ListedColormap(shades, N=levels + 1)


def _write_text(
    axes: Axes,
    tokens: Sequence[str],
    depth: Sequence[int],
    palette: Any,
    columns: int = 150,
    lines: int = 11,
) -> None:
    """The end of the text in a fixed-width font, each token on the colour of its depth."""
    cells: list[tuple[int, int, str, int]] = []  # line from the top, column, text, depth
    line, column = 0, 0
    for token, level in zip(tokens, depth, strict=True):
        shown = " ".join(token.replace("\n", " ").split("\t"))
        if column + len(shown) > columns:
            line, column = line + 1, 0
        cells.append((line, column, shown, level))
        column += len(shown)
    first = max(line + 1 - lines, 0)
    axes.set(xlim=(0, columns), ylim=(lines, 0), xticks=[], yticks=[])
    axes.set_title("the end of the text: the darker, the more layers the token reaches")
    axes.spines[:].set_visible(False)
    most = palette.N - 1
    for line, column, shown, level in cells:
        if line < first:
            continue
        y = line - first
        axes.fill_between([column, column + len(shown)], y, y + 0.92, color=palette(level), lw=0)
        color = "white" if level > 0.6 * most else "black"
        for i, character in enumerate(shown):
            axes.text(
                column + i + 0.5,
                y + 0.48,
                character.replace("$", r"\$"),
                ha="center",
                va="center",
                color=color,
                family="monospace",
                fontsize=7,
            )
