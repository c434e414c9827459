"""Results appear whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from layerlens.exceptions import OutputError
from layerlens.utils import atomic
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text, check_writable, staged_directory

AS_ROOT = os.geteuid() == 0


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    target = tmp_path / "out"
    (target / "peft").mkdir(parents=True)
    (target / "manifest.json").write_text("old")
    (target / "peft/old.safetensors").write_text("old")
    (target / "notes.txt").write_text("mine")
    return target


def test_file_is_written_with_its_folders_and_usual_permissions(tmp_path: Path) -> None:
    path = atomic_write_text(tmp_path / "a/b/c.txt", "ä")
    assert path.read_bytes() == "ä".encode()
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert os.listdir(tmp_path / "a/b") == ["c.txt"]


def test_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = atomic_write_bytes(tmp_path / "c.txt", b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot write .*c\.txt: No space left on device; free some space"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["c.txt"]


def test_staged_entries_replace_old_ones_and_leave_others(old_run: Path) -> None:
    with staged_directory(old_run) as staging:
        (staging / "manifest.json").write_text("new")
        (staging / "peft").mkdir()
        (staging / "peft/new.safetensors").write_text("new")
        assert tree(old_run)["manifest.json"] == "old"
    assert tree(old_run) == {"manifest.json": "new", "notes.txt": "mine", "peft/new.safetensors": "new"}
    assert sorted(os.listdir(old_run)) == ["manifest.json", "notes.txt", "peft"]


def test_owned_names_that_were_not_written_are_removed(old_run: Path) -> None:
    with staged_directory(old_run, owned=("peft", "manifest.json", "never-there")) as staging:
        (staging / "manifest.json").write_text("new")
    assert tree(old_run) == {"manifest.json": "new", "notes.txt": "mine"}


def test_new_target_is_made_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a/b/out"
    with staged_directory(target) as staging:
        (staging / "manifest.json").write_text("new")
        assert not target.exists()
    assert tree(tmp_path) == {"a/b/out/manifest.json": "new"}
    folder = tmp_path / "plain"
    folder.mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_everything_as_it_was(old_run: Path, error: type[BaseException]) -> None:
    before = tree(old_run)
    with pytest.raises(error), staged_directory(old_run) as staging:  # noqa: PT012
        (staging / "manifest.json").write_text("half")
        raise error
    assert tree(old_run) == before
    assert sorted(os.listdir(old_run)) == ["manifest.json", "notes.txt", "peft"]

    fresh = old_run.parent / "x/y/fresh"
    with pytest.raises(error), staged_directory(fresh) as staging:  # noqa: PT012
        (staging / "manifest.json").write_text("half")
        raise error
    assert os.listdir(old_run.parent) == ["out"]


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4, 5])
def test_an_interrupt_between_the_moves_is_undone(old_run: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
    before = tree(old_run)
    replace, calls = os.replace, []

    def interrupted(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        replace(source, destination)

    with pytest.raises(KeyboardInterrupt), staged_directory(old_run, owned=("notes.txt",)) as staging:  # noqa: PT012
        (staging / "manifest.json").write_text("new")
        (staging / "added.txt").write_text("new")
        (staging / "peft").mkdir()
        monkeypatch.setattr(atomic.os, "replace", interrupted)
    assert tree(old_run) == before
    assert sorted(os.listdir(old_run)) == ["manifest.json", "notes.txt", "peft"]


def test_full_disk_in_the_block_is_an_output_error(old_run: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device"), staged_directory(old_run):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_os_errors_in_the_block_keep_their_class(old_run: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_directory(old_run):
        (old_run / "not-there").read_text()


def test_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file is a file; choose a directory that you can write to"):
        check_writable(tmp_path / "file/out")
    with pytest.raises(OutputError, match="cannot write"):
        check_writable(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot write"), staged_directory(tmp_path / "file"):
        pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="cannot write"), staged_directory(tmp_path / "file/out"):
        pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="cannot write"):
        atomic_write_bytes(tmp_path / "file/out", b"")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_proc_cannot_be_written_even_by_root() -> None:
    with pytest.raises(OutputError, match="cannot write /proc/layerlens"):
        check_writable(Path("/proc/layerlens"))


@pytest.mark.skipif(AS_ROOT, reason="root ignores permission bits")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "out")
    tmp_path.chmod(0o755)


def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a/b")
    check_writable(tmp_path)
    assert os.listdir(tmp_path) == []
