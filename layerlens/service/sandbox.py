"""What the process of a job may open, held at every opening: by the kernel where it has Landlock, and by Python always.

What a configuration names was looked at when it came. Files that those files name, and links that were made since, are
met only when something opens them; so the process itself is bound to the roots:

- Landlock (Linux 5.19): the kernel refuses every other file to this process and its children, also to libraries that
  open files outside Python (safetensors, tokenizers, Arrow), and compares what is opened, not its name;
- an audit hook, which sees what Python opens and is stricter about the system's own files.

A job whose functions the operator has allowed (``--allow-code``) is his own code and is not bound.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import site
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from layerlens.utils.places import default_cache_dir

logger = logging.getLogger(__name__)

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""System calls of Landlock; the same numbers on every architecture."""
RULESET_VERSION, RULE_PATH_BENEATH = 1, 1
READ_FILE, READ_DIR, MOVE = 1 << 2, 1 << 3, 1 << 13
FIRST_WITH_MOVES = 2
"""Version of Landlock: the first one lets nobody move a file from one directory into another."""
SET_NO_NEW_PRIVILEGES = 38
SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/opt", "/nix/store", "/gnu/store", "/dev", "/sys", "/proc",
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ssl", "/etc/pki", "/etc/ca-certificates",
    "/etc/crypto-policies", "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf",
    "/etc/localtime", "/etc/timezone", "/etc/mime.types", "/etc/protocols", "/etc/services", "/etc/fonts",
    "/etc/alternatives", "/etc/OpenCL", "/etc/vulkan", "/etc/passwd", "/etc/group", "/run/systemd/resolve",
    "/run/nvidia-persistenced", "/var/cache/fontconfig",
)  # fmt: skip
"""Libraries, devices and what the C library looks up; no settings of services, and no data."""
NOT_BY_PYTHON = ("environ", "mem", "auxv")
"""Files of a process that hold secrets."""
OF_PROCESSES = "/proc/"
CREDENTIALS = ("~/.aws", "~/.azure", "~/.config/gcloud", "~/.netrc")
CREDENTIAL_FILES = ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_CA_BUNDLE")


@dataclass(frozen=True)
class Readable:
    """What a job may open.

    Args:
        own: roots, the server's state with the job's temporary files, caches.
        system: code and what it needs.
    """

    own: tuple[str, ...]
    system: tuple[str, ...]

    def allows(self, path: str) -> bool:
        """Whether a file with this real path may be opened."""
        if path.startswith(OF_PROCESSES) and path.rpartition("/")[2] in NOT_BY_PYTHON:
            return False
        return any(path == place or path.startswith(place.rstrip("/") + "/") for place in (*self.own, *self.system))


def readable(roots: Iterable[Path], state_dir: Path, *, urls: bool) -> Readable:
    """What a job of a server with these roots may open.

    Args:
        roots: see ``ServiceSettings``.
        state_dir: the server's.
        urls: whether jobs may use object stores, whose drivers read credentials.
    """
    own = [*map(str, roots), str(state_dir), str(default_cache_dir())]
    own += [os.environ.get("XDG_CACHE_HOME") or "~/.cache", os.environ.get("HF_HOME", ""), "~/.config/matplotlib"]
    own += [os.environ.get("TORCH_HOME", ""), os.environ.get("YOLO_CONFIG_DIR") or "~/.config/Ultralytics"]
    if urls:
        own += [*CREDENTIALS, *(os.environ.get(name, "") for name in CREDENTIAL_FILES)]
    code = [sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values(), *site.getsitepackages()]
    code += [place for place in sys.path if place and os.path.realpath(place) != os.getcwd()]
    code += os.environ.get("LD_LIBRARY_PATH", "").split(":")
    code.append(str(Path(__file__).resolve().parents[1]))
    return Readable(_existing(own), _existing([*SYSTEM, *code]))


def _existing(places: Iterable[str]) -> tuple[str, ...]:
    real = (os.path.realpath(os.path.expanduser(place)) for place in places if place)
    return tuple(dict.fromkeys(place for place in real if place != "/" and os.path.lexists(place)))


def bind(to: Readable) -> bool:
    """Bind this process, and those that it starts, for good; whether the kernel does it, too."""
    by_kernel = _landlock(to)
    if not by_kernel:
        logger.warning("this system has no Landlock: files that libraries open outside Python are checked by name only")

    def held(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and arguments:
            path = arguments[0]
            if isinstance(path, (str, bytes, os.PathLike)):
                _refuse(os.fsdecode(path))

    def _refuse(path: str) -> None:
        real = os.path.realpath(path)
        if not to.allows(real) and os.path.lexists(real):
            raise PermissionError(errno.EACCES, "is not below a root of this server", path)

    sys.addaudithook(held)
    return by_kernel


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64),)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _landlock(to: Readable) -> bool:
    """Restrict reading to what may be read; False where this kernel cannot.

    Raises:
        OSError: the kernel has it, and a rule cannot be made.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), RULESET_VERSION) < FIRST_WITH_MOVES:
        return False
    attributes = _RulesetAttributes(READ_FILE | READ_DIR | MOVE)
    ruleset = library.syscall(
        CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)), ctypes.c_uint32(0)
    )
    if ruleset < 0:
        return False
    try:
        for place in (*to.own, *to.system):
            try:
                descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
            except OSError:  # it has gone since
                continue
            access = READ_FILE | READ_DIR | MOVE if os.path.isdir(place) else READ_FILE
            rule = _PathBeneath(access, descriptor)
            try:
                _checked(library.syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), ctypes.c_uint32(0)))
            finally:
                os.close(descriptor)
        _checked(library.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
        _checked(library.syscall(RESTRICT_SELF, ruleset, ctypes.c_uint32(0)))
    finally:
        os.close(ruleset)
    return True


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")


def refuse_unpickling() -> None:
    """Make ``torch.load`` refuse in this process, whatever file it is given under whatever name."""
    import torch

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(
            errno.EACCES,
            "the file is a pickle, which runs code when it is loaded; the operator can pass --allow-pickles",
        )

    torch.load = refused
