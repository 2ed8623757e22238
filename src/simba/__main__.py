"""The entry point of ``simba`` and ``python -m simba``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what to install for it (extra ``cli``)."""
    try:
        from simba import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(
            f"simba's command line needs {package}, which is not installed. Install it with: "
            "pip install 'simba-ssm[cli]'"
        )
    cli.main()


if __name__ == "__main__":
    main()
