"""Run the command line with ``python -m lazymesh``."""

from lazymesh.cli.main import main

main()
