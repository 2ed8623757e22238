"""``python -m simba`` is the command ``simba``."""

from simba.cli import main

main()
