"""``python -m layerlens``: the command line where the script is not on PATH, and under torchrun."""

from layerlens.cli.start import main

main()
