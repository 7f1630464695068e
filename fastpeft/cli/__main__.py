"""`python -m fastpeft.cli` is `fastpeft`."""

from fastpeft.cli.app import main

main()
