"""``python -m simba.evaluate``: the command line of lm-eval, with the model class ``simba``.

    python -m simba.evaluate run --model simba \\
        --model_args pretrained=PATH,final_keep=0.1 --tasks piqa --batch_size 8
"""

from simba.errors import InputError
from simba.evaluate.lm_eval_tasks import import_harness


def main() -> None:
    """Register the model class and call the harness."""
    try:
        import_harness()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
