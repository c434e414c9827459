"""Where LayerLens keeps things on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """$LAYERLENS_CACHE, or ``layerlens`` in the user's cache directory."""
    if "LAYERLENS_CACHE" in os.environ:
        return Path(os.environ["LAYERLENS_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "layerlens"
