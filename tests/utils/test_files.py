"""Files and directories appear whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from layerlens.exceptions import OutputError
from layerlens.utils.files import directory_written_atomically, write_atomically


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_and_bytes_are_written_into_new_folders(tmp_path):
    assert write_atomically(tmp_path / "new" / "a.txt", "µ\n").read_bytes() == b"\xc2\xb5\n"
    assert write_atomically(tmp_path / "new" / "a.txt", b"\x00").read_bytes() == b"\x00"
    assert names(tmp_path / "new") == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_atomically(tmp_path / "a", "")
        with directory_written_atomically(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = write_atomically(tmp_path / "a", "old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_directory_replaces_the_old_one_whole(tmp_path):
    for file in ("first", "second"):
        with directory_written_atomically(tmp_path / "d") as folder:
            (folder / file).write_text(file)
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["second"]


def test_a_block_that_fails_leaves_the_old_directory(tmp_path):
    with directory_written_atomically(tmp_path / "d") as folder:
        (folder / "good").touch()
    with pytest.raises(ZeroDivisionError), directory_written_atomically(tmp_path / "d") as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["good"]


def test_a_file_in_the_way_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*file.*writable"):
        write_atomically(tmp_path / "file" / "a", "")
    with (
        pytest.raises(OutputError, match=r"cannot write .*file.*writable"),
        directory_written_atomically(tmp_path / "file" / "a"),
    ):
        pass
