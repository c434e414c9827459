"""Results appear whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
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


def test_staged_files_follow_the_umask_whoever_wrote_them(tmp_path: Path) -> None:
    """safetensors and ``tempfile`` make files that only their owner can read."""
    before = os.umask(0o027)
    try:
        with staged_directory(tmp_path / "out") as staging:
            (staging / "plain").touch()
            (staging / "script").touch(0o700)
            os.close(os.open(staging / "secret", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {"plain": 0o640, "script": 0o740, "secret": 0o640}


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


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4, 5, 6])
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
    reason = (
        "^cannot write /proc/layerlens: nothing new can be made in /proc; choose a directory that you can write to$"
    )
    with pytest.raises(OutputError, match=reason):
        check_writable(Path("/proc/layerlens"))
    with pytest.raises(OutputError, match=reason), staged_directory(Path("/proc/layerlens")):
        pytest.fail("the block must not run")


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


KILLED = """
import os, signal, sys
from pathlib import Path
from layerlens.utils.atomic import staged_directory

target, moves = Path(sys.argv[1]), int(sys.argv[2])
replace = os.replace

def replace_or_die(source, destination):
    global moves
    if moves == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    moves -= 1
    replace(source, destination)

with staged_directory(target, owned=("stale.html",)) as staging:
    (staging / "manifest.json").write_text("killed")
    (staging / "added.txt").write_text("killed")
    (staging / "peft").mkdir()
    (staging / "peft/killed.safetensors").write_text("killed")
    os.replace = replace_or_die
"""


def killed_run(target: Path, moves: int) -> int:
    return subprocess.run([sys.executable, "-c", KILLED, target, str(moves)], check=False).returncode


def test_what_a_killed_run_left_is_undone_and_removed_by_the_next(old_run: Path) -> None:
    """Killed before its first move, between any two, and after the last but one."""
    (old_run / "stale.html").write_text("old")
    before, moves = tree(old_run), 0
    while killed_run(old_run, moves) == -signal.SIGKILL:
        assert any(name.startswith(".out.new-") for name in os.listdir(old_run))
        with pytest.raises(ZeroDivisionError), staged_directory(old_run):
            raise ZeroDivisionError
        assert tree(old_run) == before
        assert sorted(os.listdir(old_run)) == ["manifest.json", "notes.txt", "peft", "stale.html"]
        moves += 1
    assert moves == 6  # the list of names, added.txt, manifest.json, peft away and in, stale.html away
    assert tree(old_run).keys() == {"added.txt", "manifest.json", "notes.txt", "peft/killed.safetensors"}
    assert sorted(os.listdir(old_run)) == ["added.txt", "manifest.json", "notes.txt", "peft"]


def test_a_killed_first_run_is_removed_too(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert killed_run(target, 0) == -signal.SIGKILL
    assert [name.startswith(".out.new-") for name in os.listdir(tmp_path)] == [True]
    with staged_directory(target) as staging:
        (staging / "a").write_text("new")
    assert tree(tmp_path) == {"out/a": "new"}


@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_lives_keeps_its_work_and_the_last_to_finish_stays(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "out"
    if there:
        target.mkdir()
    with staged_directory(target, owned=("added.txt", "peft")) as staging:
        (staging / "manifest.json").write_text("ours")
        assert killed_run(target, 99) == 0  # another process, from start to end
        assert tree(staging) == {"manifest.json": "ours"}
        assert (target / "manifest.json").read_text() == "killed"
    assert tree(tmp_path) == {"out/manifest.json": "ours"}


def test_old_files_are_kept_when_undoing_fails(old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace = tree(old_run), os.replace

    def broken(source: Path, destination: Path) -> None:
        if Path(source).name == "peft" and Path(source).parent.name != "out":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, destination)

    with pytest.raises(OutputError, match="Input/output error"), staged_directory(old_run) as staging:  # noqa: PT012
        (staging / "peft").mkdir()
        monkeypatch.setattr(atomic.os, "replace", broken)
    monkeypatch.undo()
    assert not (old_run / "peft").exists()
    with pytest.raises(ZeroDivisionError), staged_directory(old_run):
        raise ZeroDivisionError
    assert tree(old_run) == before
