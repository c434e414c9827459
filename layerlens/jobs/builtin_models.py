"""The builtin models: trained on this machine the first time they are wanted, and kept in the cache."""

from __future__ import annotations

from pathlib import Path

from layerlens.utils.progress import Progress, silent

BUILTIN = "builtin:plates"
VERSION = 1
"""Raised when plates, architecture or training change, so that older files in a cache are left alone."""


def builtin_detector(cache_dir: Path, *, seed: int = 0, progress: Progress = silent) -> Path:
    """Weights of the detector for drawn plates; training takes about half a minute on an idle core.

    Raises:
        ModelNotFoundError: ultralytics is not installed.
        OutputError: the cache cannot be written.
    """
    from layerlens.vision_language.demo_detector import train_demo_detector

    path = cache_dir / "models" / f"plates-detector-v{VERSION}-seed{seed}.pt"
    return path if path.is_file() else train_demo_detector(path, seed=seed, progress=progress)


def builtin_language_model(cache_dir: Path, *, seed: int = 0, progress: Progress = silent) -> Path:
    """Directory of the tiny language model that words findings on plates; training takes about half a minute.

    Raises:
        OutputError: the cache cannot be written.
    """
    from layerlens.vision_language.demo_language_model import train_language_model

    path = cache_dir / "models" / f"plates-language-model-v{VERSION}-seed{seed}"
    return path if path.is_dir() else train_language_model(path, seed=seed, progress=progress)
