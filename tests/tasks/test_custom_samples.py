"""Data of the task custom: what a list of a user's function is taken for."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerlens.config import DataConfig
from layerlens.data import load_dataset
from layerlens.exceptions import DataError

SINGLE = "import torch\ndef data():\n    return [(torch.zeros(6), torch.tensor(1)) for _ in range(4)]\n"


def test_a_list_of_single_samples_is_refused_with_what_works(tmp_path: Path) -> None:
    (tmp_path / "own_singles.py").write_text(SINGLE)
    with pytest.raises(DataError, match=r"one target for all; return single samples as a torch\.utils\.data\.Dataset"):
        load_dataset(DataConfig(source="own_singles:data"), tmp_path, "custom")
