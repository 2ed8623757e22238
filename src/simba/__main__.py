"""``simba`` and ``python -m simba``: the command line, or what to install for it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `simba.cli`, which needs the extra ``cli``."""
    try:
        from simba import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(
            f"simba's command line needs {package}, which is not installed: "
            "pip install 'simba-ssm[cli]'"
        )
    cli.main()


if __name__ == "__main__":
    main()
