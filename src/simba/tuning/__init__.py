"""Finding a configuration for a model, its texts and a budget: `simba.tune`.

- ``verb.py``: `tune`, its arguments and their checks;
- ``space.py``: what is searched: rules, fates and schedules;
- ``budget.py``: how many tokens a budget pays for;
- ``bench.py``: the model on loan, and what is measured on it;
- ``search.py``: optuna's sampler, and the choice among what it has found;
- ``results.py``: what comes of it.

It stands on `simba.evaluate`, which is imported when `tune` is called, and not with simba.
"""

from simba.tuning.results import Trial, Tuned
from simba.tuning.verb import tune

__all__ = ["Trial", "Tuned", "tune"]
