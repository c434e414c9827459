"""Where the program begins: signals are caught before its parts are imported, which takes a moment."""

from __future__ import annotations

import sys
from typing import NoReturn

from layerlens.cli.signals import CODES, Terminated, catch_signals


def main() -> NoReturn:
    """Entry point of the ``layerlens`` program."""
    catch_signals()
    try:
        from layerlens.cli.main import main as program
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except Terminated as error:
        print(f"error: {error.event}", file=sys.stderr)
        sys.exit(CODES[error.number])
    program()
