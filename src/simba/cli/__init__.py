"""The command line, ``simba``: text from a pruned model, and every experiment of `simba.evaluate`.

Needs the extra ``cli`` (typer and rich). Each command has a file of its own; `options` holds the
options that several commands share, and `experiment` runs an experiment cell by cell. Only this
package prints.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from simba.cli import (
    ablate,
    curve,
    env,
    finetune,
    flops,
    flow,
    generate,
    lm_eval,
    ppl,
    recall,
    redundancy,
    report,
    serve,
    speed,
    tune,
)
from simba.cli.grouping import flattened
from simba.presets import PURPOSES

COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate.generate_text,
    "serve": serve.serve_model,
    "ppl": ppl.measure_perplexity,
    "ablate": ablate.compare_criteria,
    "redundancy": redundancy.measure_redundancy,
    "flow": flow.measure_flow,
    "speed": speed.time_prefills,
    "recall": recall.measure_recall,
    "eval": lm_eval.score_tasks,
    "tune": tune.find_configuration,
    "finetune": finetune.finetune_model,
    "flops": flops.count_flops,
    "curve": curve.compare_models,
    "report": report.write_report,
    "env": env.show_environment,
}
"""Every command by its name, in the order in which ``simba --help`` lists them."""

app = typer.Typer(
    help="Prune prompt tokens of pretrained Mamba models, and measure what pruning changes. "
    "Figures and tables are numbered as in the paper, https://arxiv.org/abs/2505.20698.\n\n"
    "Which --preset? "
    + "; ".join(f"{name}: {purpose}" for name, purpose in PURPOSES.items())
    + ".",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
for _name, _function in COMMANDS.items():
    app.command(_name)(flattened(_function))


def main() -> None:
    """Run the command line with the arguments of this process."""
    app()
