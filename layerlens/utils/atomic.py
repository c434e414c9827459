"""Files and directories that appear whole or not at all, and the check that they can be written before work starts.

Everything is written beside its final place, on the same file system, and renamed into it: whoever reads sees the old
file or the new one, never a part, and a run that dies leaves what was there before. What
a killed run could not clean up is put in order by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from layerlens.exceptions import OutputError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Inside a working directory: the entries to come, what they replace, the names of a swap that has begun, and the file
# whose lock says that the writer lives (the kernel drops the lock with the process).
NEW, OLD, SWAP, ALIVE = "new", "old", "swap.json", "alive"
PROBE_BYTES = 1 << 20  # more than a small file that a full disk may still take in its inode or its last block


def atomic_write_bytes(path: Path, data: bytes) -> Path:
    """Write ``data`` to ``path`` in one step, on disk when it returns; missing folders are made.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full; what was at ``path`` is untouched.
    """
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):  # it is gone when all went well
                os.unlink(temporary)
    return path


def atomic_write_text(path: Path, text: str) -> Path:
    """Write ``text`` as UTF-8, as :func:`atomic_write_bytes` does."""
    return atomic_write_bytes(path, text.encode("utf-8"))


@contextmanager
def staged_directory(target: Path, owned: Collection[str] = ()) -> Iterator[Path]:
    """An empty directory to write into; when the block ends without an error, its entries move into ``target``.

    Files are replaced one by one; directories as a whole. Other files in ``target`` stay. On any exception in the block
    or while entries are moved, KeyboardInterrupt included, ``target`` is as it was before. A process that is killed
    outright leaves a hidden working directory; the next call for the same ``target`` undoes what was half moved and
    removes it. Processes that write to one ``target`` at the same time do not disturb each other: each swap is whole,
    the last one stays.

    Args:
        target: directory for the results; made with its parents if it is not there.
        owned: names in ``target`` that belong to the writer: those that the block did not write are removed, so that
            nothing of an earlier run is mistaken for a result of this one.

    Raises:
        OutputError: ``target`` cannot be made or written, or the disk is full.
    """
    target = Path(target)
    made = _missing_parents(target)
    try:
        # Inside an existing target: its parent may be read-only, or another file system (a mounted volume).
        home = target if target.is_dir() else target.parent
        home.mkdir(parents=True, exist_ok=True)
        if home != target and target.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        with _lock(target):
            _clear_dead(target)
        work, lock = _working_directory(home, target.name)
    except OSError as error:
        _remove_empty(made)
        raise cannot_write(target, error) from error
    try:
        try:
            yield work / NEW
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise cannot_write(target, error) from error
            raise
        try:
            _sync_tree(work / NEW, 0o666 & ~_umask())
            _install(work, target, owned)
            _sync_directory(home)
        except OSError as error:
            raise cannot_write(target, error) from error
    except BaseException:
        _discard(work)
        _remove_empty(made)
        raise
    else:
        _discard(work)
    finally:
        os.close(lock)


def check_writable(directory: Path) -> None:
    """Make sure that results can be written below ``directory`` before minutes of work; leaves nothing behind.

    A file is really written: as root, or on a read-only or full file system, permission bits say nothing.

    Raises:
        OutputError: ``directory`` is a file or lies below one, or cannot be made or written, or the disk is full.
    """
    directory = Path(directory)
    nearest = _nearest_existing(directory)
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is a file")
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(b"\0" * PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise cannot_write(directory, error) from error


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The OutputError for ``error``: what could not be written, why, and what to do."""
    if isinstance(error, OutputError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space, or choose a directory on another disk"
    else:
        advice = "choose a directory that you can write to"
    reason = error.strerror or str(error)
    if error.errno == errno.ENOENT:  # we make what is missing, so it is the file system (/proc, /sys) that refuses
        reason = f"nothing new can be made in {_nearest_existing(path)}"
    return OutputError(f"cannot write {path}: {reason}; {advice}")


def _working_directory(home: Path, name: str) -> tuple[Path, int]:
    """A new working directory in ``home``, and the open descriptor that holds its lock."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=home))
        try:
            alive = _open_lock(work)
        except FileNotFoundError:  # someone who clears up was faster than the lock
            continue
        _flock(alive, fcntl.LOCK_EX)
        if _is_at(alive, work / ALIVE):
            (work / NEW).mkdir()
            return work, alive
        os.close(alive)


def _clear_dead(target: Path) -> None:
    """Undo and remove what killed processes left of their work on ``target``; whoever lives holds a lock."""
    for home in (target, target.parent):
        try:
            names = [name for name in os.listdir(home) if name.startswith(_prefix(target.name))]
        except OSError:  # not there, or not ours to read
            continue
        for work in (home / name for name in names):
            try:
                alive = _open_lock(work)
            except OSError:  # it has just gone, or is another user's
                continue
            try:
                # Where a file system has no locks, nobody can tell; then it stays.
                if _flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_at(alive, work / ALIVE):
                    if target.is_dir():
                        _undo(work, target)
                    shutil.rmtree(work, ignore_errors=True)
            finally:
                os.close(alive)


def _discard(work: Path) -> None:
    if not (work / SWAP).exists():  # else even undoing failed, and what was there before is in here
        shutil.rmtree(work, ignore_errors=True)


def _install(work: Path, target: Path, owned: Collection[str]) -> None:
    """Make ``target`` of the new entries, or move them into it where it is there by now."""
    with _lock(target.parent):
        if not target.is_dir():
            os.replace(work / NEW, target)
            return
    with _lock(target):
        _clear_dead(target)  # a swap that was cut short since: undone later, it would undo ours as well
        _swap_entries(work, target, owned)


def _swap_entries(work: Path, target: Path, owned: Collection[str]) -> None:
    """Move every new entry into ``target``; on any exception put back what was there."""
    new, old = work / NEW, work / OLD
    old.mkdir()
    entries = sorted(os.listdir(new))
    atomic_write_text(work / SWAP, json.dumps(entries))
    try:
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
    except BaseException:
        _undo(work, target)
        raise
    os.unlink(work / SWAP)  # from here on, there is nothing to undo


def _undo(work: Path, target: Path) -> None:
    """Put back what an unfinished swap has moved; cut short itself, it can be done again."""
    try:
        entries = json.loads((work / SWAP).read_text(encoding="utf-8"))
    except FileNotFoundError:  # no swap had begun, or it was finished
        return
    for name in entries:
        if os.path.lexists(target / name) and not os.path.lexists(work / NEW / name):
            os.replace(target / name, work / NEW / name)
    for name in os.listdir(work / OLD):
        if not os.path.lexists(target / name):  # else the copy of a file that was not replaced, perhaps cut short
            os.replace(work / OLD / name, target / name)
    os.unlink(work / SWAP)


def _prefix(name: str) -> str:
    return f".{name}.new-"


def _open_lock(work: Path) -> int:
    return os.open(work / ALIVE, os.O_RDWR | os.O_CREAT, 0o600)


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold the lock of ``directory`` where it is there and its file system has locks."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield
        return
    try:
        _flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError:  # held by another process, or no locks here
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still is what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _nearest_existing(path: Path) -> Path:
    """``path``, or the nearest of what is above it that is there."""
    nearest = Path(path).absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    return nearest


def _missing_parents(target: Path) -> list[Path]:
    """The folders above ``target`` that are not there yet, deepest first."""
    return [parent for parent in target.absolute().parents if not parent.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not there, or no longer empty: then it is not ours to remove
            folder.rmdir()


def _sync_tree(directory: Path, mode: int) -> None:
    """Everything on disk, every file with at least the permissions ``mode``.

    Libraries that write a file under another name first (safetensors) leave it readable by its owner alone.
    """
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode | mode)
                os.fsync(file.fileno())
        _sync_directory(Path(folder))


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
