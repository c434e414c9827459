"""Checkpoints on disk: a kill while they are removed leaves none that a training would go on from."""

from __future__ import annotations

import shutil

import pytest

from layerlens.tuning.checkpoints import (
    PROGRESS_FILE,
    WEIGHTS_FILE,
    checkpoint_path,
    finish_checkpoint,
    last_checkpoint,
    remove_checkpoints,
)


def test_a_kill_while_checkpoints_are_removed_leaves_none_to_go_on_from(tmp_path, monkeypatch):
    for step in (3, 6):
        path = checkpoint_path(tmp_path / "checkpoints", step)
        path.mkdir(parents=True)
        (path / WEIGHTS_FILE).write_bytes(b"weights")
    finish_checkpoint(path, {"step": 6}, keep=())
    assert last_checkpoint(tmp_path / "checkpoints") == path
    assert not checkpoint_path(tmp_path / "checkpoints", 3).exists()

    def killed(directory, **_):
        (directory / WEIGHTS_FILE).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoints(tmp_path / "checkpoints")
    assert last_checkpoint(tmp_path / "checkpoints") is None
    assert not (path / PROGRESS_FILE).exists()
    monkeypatch.undo()
    remove_checkpoints(tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()
