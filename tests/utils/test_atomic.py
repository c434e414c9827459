"""Results appear whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from layerlens.exceptions import OutputError
from layerlens.utils import atomic, exchange
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text, check_writable, settle, staged_directory

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


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange directories."""
    monkeypatch.setattr(exchange, "can_exchange_in", lambda _directory: False)


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


CALLS = ("replace", "link", "symlink", "mkdir", "listdir", "open", "chmod")


@pytest.mark.parametrize("whole", [True, False], ids=["exchanged", "one by one"])
def test_an_interrupt_at_any_call_is_undone(
    old_run: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, whole: bool
) -> None:
    """From the end of the block on, at every call of the operating system, the exchange among them."""
    if not whole:
        request.getfixturevalue("no_exchange")
    (old_run / "mine").mkdir()
    (old_run / "mine/notes.txt").write_text("mine")
    before, fail_at = tree(old_run), 0
    after = {"added.txt": "new", "manifest.json": "new", "mine/notes.txt": "mine", "notes.txt": "mine"}
    places = [(os, name) for name in CALLS] + [(exchange, "exchange")]
    while True:
        fail_at += 1
        calls = 0

        def counted(call: Callable[..., object], last: int = fail_at) -> Callable[..., object]:
            def wrapped(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == last:
                    raise KeyboardInterrupt
                return call(*args, **kwargs)

            return wrapped

        try:
            with staged_directory(old_run, owned=("stale.html",)) as staging:
                (staging / "manifest.json").write_text("new")
                (staging / "added.txt").write_text("new")
                (staging / "peft").mkdir()
                patches = pytest.MonkeyPatch()
                for module, name in places:
                    patches.setattr(module, name, counted(getattr(module, name)))
        except KeyboardInterrupt:
            patches.undo()
            there = tree(old_run)
            assert there in (before, after), fail_at
            assert os.listdir(old_run.parent) == ["out"]
            assert not any(name.startswith(".") for name in os.listdir(old_run))
            if there == after:  # only removing the old one was left, and is done
                break
        else:
            patches.undo()
            break
    assert fail_at > 10
    assert tree(old_run) == after


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
    reason = "^cannot write /proc/layerlens: /proc is not writable; choose a directory that you can write to$"
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
from layerlens.utils import exchange
from layerlens.utils.atomic import staged_directory

target, moves, whole = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"

def or_die(call):
    def wrapped(*args, **kwargs):
        global moves
        if moves == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        moves -= 1
        return call(*args, **kwargs)
    return wrapped

if not whole:
    exchange.can_exchange_in = lambda directory: False
with staged_directory(target, owned=("stale.html",)) as staging:
    (staging / "manifest.json").write_text("killed")
    (staging / "added.txt").write_text("killed")
    (staging / "peft").mkdir()
    (staging / "peft/killed.safetensors").write_text("killed")
    for name in ("replace", "link", "mkdir", "unlink", "rmdir"):
        setattr(os, name, or_die(getattr(os, name)))
    exchange.exchange = or_die(exchange.exchange)
"""


def killed_run(target: Path, moves: int, whole: bool = True) -> int:
    command = [sys.executable, "-c", KILLED, target, str(moves), str(whole)]
    return subprocess.run(command, check=False).returncode


@pytest.mark.parametrize("whole", [True, False], ids=["exchanged", "one by one"])
def test_whenever_a_run_is_killed_the_whole_old_or_the_whole_new_is_there(old_run: Path, whole: bool) -> None:
    """Killed before every call that changes something; seen at once if directories are exchanged, else when read."""
    (old_run / "stale.html").write_text("old")
    (old_run / "mine/deep").mkdir(parents=True)
    (old_run / "mine/deep/notes.txt").write_text("mine")
    before, moves = tree(old_run), 0
    foreign = {"notes.txt": "mine", "mine/deep/notes.txt": "mine"}
    after = foreign | dict.fromkeys(("added.txt", "manifest.json", "peft/killed.safetensors"), "killed")
    inodes = {name: (old_run / name).stat().st_ino for name in foreign}
    kept = old_run.parent / "kept"
    shutil.copytree(old_run, kept)
    seen = set()
    while killed_run(old_run, moves, whole) == -signal.SIGKILL:
        if not whole:
            settle(old_run)
        there = {name: text for name, text in tree(old_run).items() if not name.startswith(".")}
        assert there in (before, after), moves
        seen.add(there == before)
        with pytest.raises(ZeroDivisionError), staged_directory(old_run):
            raise ZeroDivisionError
        assert tree(old_run) == there
        assert {path.name for path in old_run.parent.iterdir()} == {"out", "kept"}  # no working directory is left
        assert not any(name.startswith(".") for name in os.listdir(old_run))
        if there == after:  # begin again with the old one
            for name in ("added.txt", "manifest.json", "peft"):
                shutil.rmtree(old_run / name) if (old_run / name).is_dir() else (old_run / name).unlink()
            for name in ("manifest.json", "stale.html", "peft"):
                (shutil.copytree if (kept / name).is_dir() else shutil.copy2)(kept / name, old_run / name)
        moves += 1
    assert seen == {True, False}
    assert tree(old_run) == after
    assert {name: (old_run / name).stat().st_ino for name in foreign} == inodes  # the same files, not copies


def test_where_a_swap_that_was_cut_short_cannot_be_undone_it_is_said(old_run: Path) -> None:
    assert killed_run(old_run, 5, whole=False) == -signal.SIGKILL
    (work,) = (path for path in old_run.iterdir() if path.name.startswith(".out.new-"))
    shutil.rmtree(work / "old")
    with pytest.raises(OutputError, match="left old and new files mixed, and they cannot be restored: No such file"):
        settle(old_run / "peft")


def test_what_others_write_while_the_directories_change_places_is_kept(
    old_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old_run / "mine").mkdir()
    (old_run / "mine/changed.txt").write_text("old")
    real = exchange.exchange

    def late(one: Path, other: Path) -> None:
        if other == old_run:
            (old_run / "late.txt").write_text("mine")
            (old_run / "mine/late.txt").write_text("mine")
            (old_run / "mine/changed.new").write_text("mine")
            os.replace(old_run / "mine/changed.new", old_run / "mine/changed.txt")
        real(one, other)

    monkeypatch.setattr(exchange, "exchange", late)
    with staged_directory(old_run, owned=("peft",)) as staging:
        (staging / "manifest.json").write_text("new")
    assert tree(old_run) == {
        "late.txt": "mine", "manifest.json": "new", "mine/changed.txt": "mine", "mine/late.txt": "mine",
        "notes.txt": "mine",
    }  # fmt: skip


def test_a_link_is_followed_and_permissions_stay(old_run: Path) -> None:
    link = old_run.parent / "link"
    link.symlink_to("out")
    (old_run / "dangling").symlink_to("nowhere")
    old_run.chmod(0o2750)
    with staged_directory(link) as staging:
        (staging / "manifest.json").write_text("new")
    assert link.is_symlink()
    assert (link / "manifest.json").read_text() == "new"
    assert os.readlink(old_run / "dangling") == "nowhere"
    assert stat.S_IMODE(old_run.stat().st_mode) == 0o2750


def test_a_directory_that_a_program_works_in_stays_itself(old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old_run / "peft")
    inode = old_run.stat().st_ino
    with staged_directory(old_run) as staging:
        (staging / "manifest.json").write_text("new")
    assert old_run.stat().st_ino == inode
    assert (old_run / "manifest.json").read_text() == "new"


def test_the_longest_name_that_a_file_can_have(tmp_path: Path) -> None:
    name = "ä" * 127
    with staged_directory(tmp_path / name) as staging:
        (staging / "a").write_text("new")
    atomic_write_text(tmp_path / name / ("b" * 255), "new")
    assert tree(tmp_path) == {f"{name}/a": "new", f"{name}/{'b' * 255}": "new"}


def test_what_was_left_of_a_file_is_removed_when_it_is_written_again(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from layerlens.utils.atomic import atomic_write_text\n"
        "os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write_text(sys.argv[1], 'killed')\n"
    )
    (tmp_path / ".a.mine").touch()
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=False).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    atomic_write_text(tmp_path / "a", "new")
    assert sorted(os.listdir(tmp_path)) == [".a.mine", "a"]


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


@pytest.mark.usefixtures("no_exchange")
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
