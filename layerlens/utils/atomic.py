"""Files and directories that appear whole or not at all, and the check that they can be written before work starts.

Everything is written beside its final place, on the same file system, and takes that place in one step: whoever reads
sees the old file or the new one, the old directory or the new one, never a part, and a run that dies leaves what was
there before. Where a directory cannot be replaced as a whole (``exchange``), its entries are moved one by one; what a
kill leaves of that is undone before anything of it is read (``settle``). What a killed run could not remove is removed
by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from layerlens.exceptions import OutputError
from layerlens.utils.working import (
    NEW,
    clear_dead,
    clear_temporaries,
    discard,
    has_begun,
    install,
    lock_temporary,
    locked,
    new_working_directory,
    sync_directory,
    temporary_prefix,
    working_directories,
)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
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
        clear_temporaries(path)
        while True:
            descriptor, temporary = tempfile.mkstemp(prefix=temporary_prefix(path.name), dir=path.parent)
            if lock_temporary(descriptor, Path(temporary)):
                break
            os.close(descriptor)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
            os.replace(temporary, path)
        sync_directory(path.parent)
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
    """An empty directory to write into; when the block ends without an error, its entries are those of ``target``.

    Other files in ``target`` stay; directories are replaced as a whole. Where system, file system and place allow it,
    all entries appear in one step; else one by one. On any exception in the block or while that happens,
    KeyboardInterrupt included, ``target`` is as it was before. A process that is killed outright leaves a hidden
    working directory; the next call for the same ``target`` undoes what was half moved and removes it. Processes that
    write to one ``target`` at the same time do not disturb each other: each swap is whole, the last one stays.

    Args:
        target: directory for the results; made with its parents if it is not there. A link is followed.
        owned: names in ``target`` that belong to the writer: those that the block did not write are removed, so that
            nothing of an earlier run is mistaken for a result of this one.

    Raises:
        OutputError: ``target`` cannot be made or written, or the disk is full.
    """
    given, target = Path(target), Path(os.path.realpath(target))
    made = _missing_parents(target)
    try:
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        with locked(target.parent), locked(target):
            clear_dead(target)
        work, lock = new_working_directory(target)
    except OSError as error:
        _remove_empty(made)
        raise cannot_write(given, error) from error
    try:
        try:
            yield work / NEW
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise cannot_write(given, error) from error
            raise
        try:
            _sync_tree(work / NEW, 0o666 & ~_umask())
            install(work, target, owned)
            sync_directory(work.parent)
        except OSError as error:
            raise cannot_write(given, error) from error
    except BaseException:
        discard(work)
        _remove_empty(made)
        raise
    else:
        discard(work)
    finally:
        os.close(lock)


def settle(path: Path) -> None:
    """Put in order what a killed writer left half moved in the result directory ``path``, or in the one around it.

    Call it before a result is read. Where directories are exchanged as a whole there is never anything to do.

    Raises:
        OutputError: it cannot be put in order; then ``path`` is a mixture of two results.
    """
    for directory in dict.fromkeys((Path(os.path.realpath(path)), Path(os.path.realpath(path)).parent)):
        if any(map(has_begun, working_directories(directory))):
            _clear(directory)


def check_writable(directory: Path) -> None:
    """Make sure that results can be written below ``directory`` before minutes of work; leaves nothing behind.

    What killed runs left of their work on ``directory`` is put in order and removed. A file is really written: as root,
    or on a read-only or full file system, permission bits say nothing.

    Raises:
        OutputError: ``directory`` is a file or lies below one, or cannot be made or written, or the disk is full.
    """
    directory = Path(directory)
    _clear(Path(os.path.realpath(directory)))
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
        reason = f"{_nearest_existing(path)} is not writable"
    return OutputError(f"cannot write {path}: {reason}; {advice}")


def _clear(directory: Path) -> None:
    try:
        with locked(directory.parent), locked(directory):
            clear_dead(directory)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{directory}: a killed run left old and new files mixed, and they cannot be restored: {reason}; run it "
            "again where the directory can be written"
        ) from error


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
        sync_directory(Path(folder))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
