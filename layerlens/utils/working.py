"""The working directory of a result that is being written, how it takes the result's place, and what a kill leaves.

A working directory ``.NAME.new-XXXXXXXX`` lies beside the result NAME, or in it where it cannot lie beside it. It holds
a file that its writer keeps locked: the kernel drops the lock with the process, so that anyone can tell what is dead.
Before a swap begins, its journal is on disk; it says how to put in order what was cut short:

- ``{"exchanged": inode, "ours": [names]}``: the directories change places in one step. Where the result has this inode,
  it is the new one, and what others wrote to the old one meanwhile is brought over. Else nothing had happened.
- ``{"entries": [names]}``: the new entries are moved in one by one. What was moved is moved back.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from layerlens.utils import exchange as directories
from layerlens.utils.exchange import NotExchangeable

# Inside a working directory: the entries to come, what they replace, the journal of a swap that has begun, and the file
# whose lock says that the writer lives.
NEW, OLD, SWAP, ALIVE = "new", "old", "swap.json", "alive"
LONGEST_NAME = 200  # bytes of a name that another one is made of; file systems take 255


def new_working_directory(target: Path) -> tuple[Path, int]:
    """A new working directory for ``target``, and the open descriptor that holds its lock.

    Beside a target that is there, if the two can change places; else in it: its parent may be read-only, or another
    file system (a mounted volume).
    """
    if not target.is_dir():
        return _made_in(target.parent, target.name)
    if directories.may_be_exchanged(target):
        work, lock = _made_in(target.parent, target.name)
        if directories.can_exchange_in(work):
            return work, lock
        discard(work)
        os.close(lock)
    return _made_in(target, target.name)


def install(work: Path, target: Path, owned: Collection[str]) -> None:
    """Let the new entries take the place of ``target``: as a whole where that can be, else one by one.

    On any exception ``target`` is as it was before.
    """
    with locked(target.parent), locked(target):
        if not target.is_dir():
            os.replace(work / NEW, target)
            return
        clear_dead(target)  # a swap that was cut short since: undone later, it would undo ours as well
        entries = sorted(os.listdir(work / NEW))
        if work.parent != target and directories.may_be_exchanged(target):
            try:
                _exchange(work, target, owned)
                return
            except NotExchangeable:
                pass
        _swap_entries(work, target, entries, owned)


def discard(work: Path) -> None:
    """Remove a working directory, unless even undoing failed: then what was there before is in it."""
    if has_begun(work):
        return
    try:
        shutil.rmtree(work, ignore_errors=True)
    except BaseException:  # interrupted while it removes: the rest goes too
        shutil.rmtree(work, ignore_errors=True)
        raise


def clear_dead(target: Path) -> None:
    """Put in order and remove what killed processes left of their work on ``target``; whoever lives holds a lock.

    Raises:
        OSError: a swap was cut short and cannot be undone.
    """
    for work in working_directories(target):
        try:
            alive = _open_lock(work)
        except OSError:  # it has just gone, or is another user's
            continue
        try:
            # Where a file system has no locks, nobody can tell; then it stays.
            if _flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB) and is_at(alive, work / ALIVE):
                if target.is_dir():
                    _put_in_order(work, target)
                shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(alive)


def working_directories(target: Path) -> list[Path]:
    """Those of ``target``, living and dead."""
    found = []
    for home in dict.fromkeys((target, target.parent)):
        with suppress(OSError):  # not there, or not ours to read
            found += [home / name for name in os.listdir(home) if name.startswith(_prefix(target.name))]
    return found


def has_begun(work: Path) -> bool:
    """Whether a swap was begun and not ended."""
    return os.path.lexists(work / SWAP)


def is_alive(work: Path) -> bool:
    """Whether the writer of this working directory lives; of one whose file system has no locks, yes."""
    try:
        alive = os.open(work / ALIVE, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(alive)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of ``directory`` where it is there and its file system has locks."""
    with ExitStack() as held:
        while True:
            try:
                descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                break
            _flock(descriptor, fcntl.LOCK_EX)
            if is_at(descriptor, directory):
                held.callback(os.close, descriptor)
                break
            os.close(descriptor)  # another one took its place while we waited
        yield


def lock_temporary(descriptor: int, path: Path) -> bool:
    """Say that the writer of a temporary file lives; False where someone who clears up was faster."""
    _flock(descriptor, fcntl.LOCK_EX)
    return is_at(descriptor, path)


def clear_temporaries(path: Path) -> None:
    """Remove what killed processes left of their writing of ``path``."""
    start = temporary_prefix(path.name)
    for name in os.listdir(path.parent):
        if not name.startswith(start) or len(name) != len(start) + 8:  # as mkstemp names them
            continue
        there = path.parent / name
        with suppress(OSError):
            descriptor = os.open(there, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) and is_at(descriptor, there):
                    os.unlink(there)
            finally:
                os.close(descriptor)


def temporary_prefix(name: str) -> str:
    """How the names of temporary files for ``name`` begin."""
    return f".{_shortened(name)}."


def is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still is what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def sync_directory(directory: Path) -> None:
    """Have the names in ``directory`` on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def _made_in(home: Path, name: str) -> tuple[Path, int]:
    while True:
        work = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=home))
        try:
            alive = _open_lock(work)
        except FileNotFoundError:  # someone who clears up was faster than the lock
            continue
        _flock(alive, fcntl.LOCK_EX)
        if is_at(alive, work / ALIVE):
            (work / NEW).mkdir()
            return work, alive
        os.close(alive)


def _exchange(work: Path, target: Path, owned: Collection[str]) -> None:
    """Let the new directory, with all that others have in ``target``, take its place in one step."""
    new = work / NEW
    ours = sorted({*os.listdir(new), *owned})
    if _in_use(target):
        raise NotExchangeable(errno.EBUSY, str(target))
    directories.carry(target, new, {*os.listdir(target)} - {*ours}, _in_use)
    directories.inherit(target, new)
    for folder, _, _ in os.walk(new):
        sync_directory(Path(folder))
    inode = os.stat(new).st_ino
    try:
        _write_journal(work, {"exchanged": inode, "ours": ours})
        directories.exchange(new, target)
        sync_directory(target.parent)
        directories.bring_over(new, target, ours)
    except BaseException as error:
        if os.stat(target).st_ino == inode:
            directories.exchange(new, target)
            directories.bring_over(new, target, ours)
        (work / SWAP).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise NotExchangeable(error.errno, str(error)) from error
        raise
    os.unlink(work / SWAP)  # from here on, there is nothing to undo


def _in_use(directory: Path) -> bool:
    """Whether a writer that lives has its working directory directly below ``directory``."""
    return any(".new-" in name and is_alive(directory / name) for name in os.listdir(directory))


def _swap_entries(work: Path, target: Path, entries: list[str], owned: Collection[str]) -> None:
    """Move every new entry into ``target``; on any exception put back what was there."""
    new, old = work / NEW, work / OLD
    try:
        old.mkdir()
        _write_journal(work, {"entries": entries})
        for name in entries:
            there = target / name
            if there.is_symlink() or there.is_file():
                shutil.copy2(there, old / name, follow_symlinks=False)  # the file itself stays until it is replaced
            elif there.is_dir():
                os.replace(there, old / name)
            os.replace(new / name, there)
        for name in sorted(set(owned) - set(entries)):
            if os.path.lexists(target / name):
                os.replace(target / name, old / name)
        sync_directory(target)
    except BaseException:
        _put_in_order(work, target)
        raise
    os.unlink(work / SWAP)  # from here on, there is nothing to undo


def _put_in_order(work: Path, target: Path) -> None:
    """End or undo a swap that was cut short; cut short itself, it can be done again."""
    try:
        journal = json.loads((work / SWAP).read_text(encoding="utf-8"))
    except FileNotFoundError:  # no swap had begun, or it was finished
        return
    if "exchanged" in journal:
        if os.stat(target).st_ino == journal["exchanged"]:
            directories.bring_over(work / NEW, target, journal["ours"])
    else:
        _undo_entries(work, target, journal["entries"])
    os.unlink(work / SWAP)


def _undo_entries(work: Path, target: Path, entries: list[str]) -> None:
    for name in entries:
        if os.path.lexists(target / name) and not os.path.lexists(work / NEW / name):
            os.replace(target / name, work / NEW / name)
    for name in os.listdir(work / OLD):
        if not os.path.lexists(target / name):  # else the copy of a file that was not replaced, perhaps cut short
            os.replace(work / OLD / name, target / name)


def _write_journal(work: Path, journal: dict[str, object]) -> None:
    written = work / f"{SWAP}.part"
    with written.open("w", encoding="utf-8") as file:
        json.dump(journal, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, work / SWAP)
    sync_directory(work)


def _prefix(name: str) -> str:
    return f".{_shortened(name)}.new-"


def _shortened(name: str) -> str:
    raw = os.fsencode(name)
    return name if len(raw) <= LONGEST_NAME else hashlib.sha256(raw).hexdigest()


def _open_lock(work: Path) -> int:
    return os.open(work / ALIVE, os.O_RDWR | os.O_CREAT, 0o600)


def _flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError:  # held by another process, or no locks here
        return False
    return True
