"""The package's logger: silent until a handler is given, and one handler at a time."""

from __future__ import annotations

import io
import logging

from layerlens.utils.progress import NAME, show_logs


def test_one_handler_at_a_time() -> None:
    logger, area = logging.getLogger(NAME), logging.getLogger("layerlens.profiling")
    before = list(logger.handlers)
    first, second = io.StringIO(), io.StringIO()
    try:
        show_logs(logging.StreamHandler(first))
        area.debug("measured %d layers", 3)
        show_logs(logging.StreamHandler(second), logging.WARNING)
        area.info("not shown")
        area.warning("shown")
    finally:
        logger.handlers[:] = before
        logger.setLevel(logging.NOTSET)
    assert first.getvalue() == "measured 3 layers\n"
    assert second.getvalue() == "shown\n"
