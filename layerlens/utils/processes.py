"""Which of several processes of one training this is (torchrun and accelerate say so in RANK)."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Whether this one writes, publishes and tells; true where there is only one."""
    return int(os.environ.get("RANK", 0)) == 0
