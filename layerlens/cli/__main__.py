"""``python -m layerlens.cli``: the command line of a checkout that is not installed."""

from layerlens.cli.main import main

main()
