"""Files and directories that appear whole or not at all, and the check that they can be written before work starts.

Everything is written beside its final place, on the same file system, and renamed into it: whoever reads sees the old
file or the new one, never a part, and a run that dies leaves what was there before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from layerlens.exceptions import OutputError

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
    or while entries are moved, KeyboardInterrupt included, ``target`` is as it was before.

    Args:
        target: directory for the results; made with its parents if it is not there.
        owned: names in ``target`` that belong to the writer: those that the block did not write are removed, so that
            nothing of an earlier run is mistaken for a result of this one.

    Raises:
        OutputError: ``target`` cannot be made or written, or the disk is full.
    """
    target = Path(target)
    made = _missing_parents(target)
    existed = target.is_dir()
    try:
        # Inside an existing target: its parent may be read-only, or another file system (a mounted volume).
        home = target if existed else target.parent
        home.mkdir(parents=True, exist_ok=True)
        if not existed and target.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=home))
    except OSError as error:
        _remove_empty(made)
        raise cannot_write(target, error) from error
    try:
        try:
            yield staging
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise cannot_write(target, error) from error
            raise
        try:
            _sync_tree(staging)
            os.chmod(staging, 0o777 & ~_umask())
            if existed:
                _swap_entries(staging, target, owned)
            else:
                os.replace(staging, target)
            _sync_directory(home)
        except OSError as error:
            raise cannot_write(target, error) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def check_writable(directory: Path) -> None:
    """Make sure that results can be written below ``directory`` before minutes of work; leaves nothing behind.

    A file is really written: as root, or on a read-only or full file system, permission bits say nothing.

    Raises:
        OutputError: ``directory`` is a file or lies below one, or cannot be made or written, or the disk is full.
    """
    directory = Path(directory)
    nearest = directory.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
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
    return OutputError(f"cannot write {path}: {error.strerror or error}; {advice}")


def _swap_entries(staging: Path, target: Path, owned: Collection[str]) -> None:
    """Move every entry of ``staging`` into ``target``; on any exception put back what was there."""
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target))
    entries = sorted(os.listdir(staging))
    arrived: list[str] = []
    try:
        for name in entries:
            old = target / name
            if old.is_symlink() or old.is_file():
                shutil.copy2(old, retired / name, follow_symlinks=False)  # the file itself stays until it is replaced
            elif old.is_dir():
                os.replace(old, retired / name)
            arrived.append(name)
            os.replace(staging / name, old)
        for name in sorted(set(owned) - set(entries)):
            if (target / name).exists():
                os.replace(target / name, retired / name)
    except BaseException:
        for name in arrived:
            _remove(target / name)
        for name in os.listdir(retired):
            if not os.path.lexists(target / name):  # else the copy of a file that was not replaced, perhaps cut short
                os.replace(retired / name, target / name)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _missing_parents(target: Path) -> list[Path]:
    """The folders above ``target`` that are not there yet, deepest first."""
    return [parent for parent in target.absolute().parents if not parent.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not there, or no longer empty: then it is not ours to remove
            folder.rmdir()


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
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
