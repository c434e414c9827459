"""The logger named ``layerlens``: silent in a library, shown on stderr by ``--verbose``."""

from __future__ import annotations

import logging

NAME = "layerlens"
logging.getLogger(NAME).addHandler(logging.NullHandler())


def show_logs(handler: logging.Handler, level: int = logging.DEBUG) -> None:
    """Send what LayerLens logs from ``level`` on to ``handler``; the handler of an earlier call is replaced."""
    logger = logging.getLogger(NAME)
    for old in [old for old in logger.handlers if not isinstance(old, logging.NullHandler)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
