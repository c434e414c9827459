"""The package's logger: silent until a handler is given, and one handler at a time."""

from __future__ import annotations

import io
import logging

from layerlens.utils.logging import NAME, get_logger, show_logs


def test_one_handler_at_a_time() -> None:
    logger, before = get_logger(), list(logging.getLogger(NAME).handlers)
    assert logger.name == "layerlens"
    first, second = io.StringIO(), io.StringIO()
    try:
        show_logs(logging.StreamHandler(first))
        get_logger("profiling").debug("measured %d layers", 3)
        show_logs(logging.StreamHandler(second), logging.WARNING)
        get_logger("profiling").info("not shown")
        get_logger("profiling").warning("shown")
    finally:
        logger.handlers[:] = before
        logger.setLevel(logging.NOTSET)
    assert first.getvalue() == "measured 3 layers\n"
    assert second.getvalue() == "shown\n"
