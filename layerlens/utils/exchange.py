"""Two directories change places in one step: whoever reads sees the whole old one or the whole new one.

Linux has it as renameat2 with RENAME_EXCHANGE, macOS as renamex_np with RENAME_SWAP; not every file system does it. The
new directory has to hold everything that is to stay beforehand: files of others are hard-linked into it, so that they
are the same files in both, and nothing is copied.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

MOST_CARRIED = 20_000
"""Entries of others that are linked into the new directory (about 20 µs each); more, and names are swapped instead."""
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2
_RENAMEAT2 = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "ppc64le": 357, "s390x": 347}


class NotExchangeable(OSError):
    """This directory cannot be replaced as a whole; its entries can be, one by one."""


def exchange(one: Path, other: Path) -> None:
    """Let two directories of one file system change places.

    Raises:
        OSError: the system or the file system cannot do it.
    """
    status = _rename_swapping()(os.fsencode(one), os.fsencode(other))
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def may_be_exchanged(target: Path) -> bool:
    """Whether ``target``, a directory, may give its place to another one, as far as can be told without trying.

    Not where a program works in it or below it (this one, whose working directory would become the old one), where
    something is mounted on it or below it, or where its parent is not ours to write.
    """
    parent = target.parent
    try:
        there, above = os.stat(target), os.stat(parent)
    except OSError:
        return False
    if there.st_dev != above.st_dev or parent == target or _has_mount(target) or _holds_working_directory(target):
        return False
    sticky = bool(above.st_mode & 0o1000) and os.geteuid() not in (0, there.st_uid, above.st_uid)
    return not sticky and os.access(parent, os.W_OK | os.X_OK)


def can_exchange_in(directory: Path) -> bool:
    """Whether the file system of ``directory`` exchanges directories; tried with two that are made there."""
    pair = directory / "one", directory / "other"
    try:
        for each in pair:
            each.mkdir()
        exchange(*pair)
    except OSError:
        return False
    finally:
        for each in pair:
            shutil.rmtree(each, ignore_errors=True)
    return True


def carry(source: Path, destination: Path, names: Collection[str], is_in_use: Any) -> None:
    """Link what ``source`` has under ``names`` into ``destination``: directories are made again, files are the same.

    Args:
        source: the directory that is to be replaced.
        destination: what will replace it.
        names: entries of others.
        is_in_use: (path) → whether a program that lives writes below this directory.

    Raises:
        NotExchangeable: something cannot be linked, is in use, or there is too much of it.
    """
    left = MOST_CARRIED
    pending = [(source / name, destination / name) for name in names]
    try:
        while pending:
            there, here = pending.pop()
            left -= 1
            if left < 0:
                raise NotExchangeable(errno.E2BIG, f"more than {MOST_CARRIED} entries")
            if there.is_symlink():
                os.symlink(os.readlink(there), here)
            elif there.is_dir():
                if is_in_use(there) or os.stat(there).st_dev != os.stat(source).st_dev:
                    raise NotExchangeable(errno.EBUSY, str(there))
                here.mkdir()
                pending += [(there / name, here / name) for name in os.listdir(there)]
                inherit(there, here)
            else:
                os.link(there, here, follow_symlinks=False)
    except OSError as error:
        raise error if isinstance(error, NotExchangeable) else NotExchangeable(error.errno, str(error)) from error


def bring_over(source: Path, destination: Path, ours: Collection[str]) -> None:
    """Move what others have written to ``source`` since it was carried into ``destination``.

    Args:
        source, destination: the two directories.
        ours: names in them that are no others'.
    """
    for name in sorted({*os.listdir(source)} - {*ours}):
        there, here = source / name, destination / name
        both = os.path.lexists(here)
        if both and _is_real_directory(there) and _is_real_directory(here):
            bring_over(there, here, ())
        elif not both or not (_same(there, here) or there.is_symlink()):
            os.replace(there, here)


def inherit(source: Path, destination: Path) -> None:
    """Give ``destination`` owner, permissions and extended attributes (access lists among them) of ``source``.

    Raises:
        NotExchangeable: they cannot be given.
    """
    there, here = os.stat(source), os.stat(destination)
    try:
        if (there.st_uid, there.st_gid) != (here.st_uid, here.st_gid):
            os.chown(destination, there.st_uid, there.st_gid)
        shutil.copystat(source, destination)
    except OSError as error:
        raise NotExchangeable(error.errno, str(error)) from error


def _is_real_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _same(one: Path, other: Path) -> bool:
    return os.path.samestat(os.lstat(one), os.lstat(other))


def _holds_working_directory(directory: Path) -> bool:
    try:
        return Path(os.getcwd()).is_relative_to(directory)
    except FileNotFoundError:  # ours has been removed
        return False


def _has_mount(directory: Path) -> bool:
    """Whether something is mounted on ``directory`` or below it; a bind mount has the device of what is around it."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            places = [line.split(" ")[4] for line in mounts]
    except OSError:  # no /proc
        return os.path.ismount(directory)
    written = str(directory)
    for plain, code in (("\\", "\\134"), (" ", "\\040"), ("\t", "\\011"), ("\n", "\\012")):
        written = written.replace(plain, code)
    return any(place == written or place.startswith(f"{written}/") for place in places)


@cache
def _rename_swapping() -> Any:
    """(bytes, bytes) → 0 where the two have changed places."""
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return lambda one, other: library.renamex_np(one, other, ctypes.c_uint(_RENAME_SWAP))
    flags = ctypes.c_uint(_RENAME_EXCHANGE)
    if sys.platform.startswith("linux"):
        if hasattr(library, "renameat2"):
            return lambda one, other: library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, flags)
        number = _RENAMEAT2.get(platform.machine())
        if number is not None:  # an older C library
            return lambda one, other: library.syscall(
                ctypes.c_long(number), ctypes.c_int(_AT_FDCWD), one, ctypes.c_int(_AT_FDCWD), other, flags
            )
    return _unknown_here


def _unknown_here(_one: bytes, _other: bytes) -> int:
    ctypes.set_errno(errno.ENOSYS)
    return -1
