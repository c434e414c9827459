"""What LayerLens finds on this machine: kernels, cores, memory, cache and OpenMP runtimes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from layerlens import __version__
from layerlens.cli.requirements import Requirement, pip_line, requirements

OK, HINT, PROBLEM = "ok", "hint", "problem"
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of ``layerlens doctor``: what was looked at, what was found, and what to do about it.

    ``status`` is "ok", "hint" (something is off or could be better) or "problem" (LayerLens cannot work).
    """

    subject: str
    found: str
    status: str = OK
    advice: str = ""


def examine() -> list[Finding]:
    """All findings, in the order of a checklist."""
    return [_python(), *_packages(), *_kernels(), _cores(), _memory(), _cache(), *_openmp()]


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable}), {platform.platform(terse=True)}"
    return Finding("Python", found)


def _packages() -> list[Finding]:
    needed = requirements()
    if needed is None:
        advice = "pip install -e . (in the checkout)"
        return [Finding("LayerLens", f"{__version__}, run from its source, not installed", HINT, advice)]
    findings = [Finding("LayerLens", __version__)]
    for extra in dict.fromkeys(requirement.extra for requirement in needed):
        group = [requirement for requirement in needed if requirement.extra == extra]
        missing = [requirement for requirement in group if not requirement.satisfied]
        subject = f"extra [{extra}]" if extra else "core packages"
        found = ", ".join(_describe(requirement) for requirement in group)
        status = OK if not missing else HINT if extra else PROBLEM
        findings.append(Finding(subject, found, status, pip_line(missing) if missing else ""))
    return findings


def _describe(requirement: Requirement) -> str:
    if requirement.found is None:
        return f"{requirement.name} missing"
    if not requirement.satisfied:
        return f"{requirement.name} {requirement.found} (needs {requirement.wanted})"
    return f"{requirement.name} {requirement.found}"


def _kernels() -> list[Finding]:
    try:
        kernels = importlib.import_module("layerlens.kernels")
    except ImportError as error:
        advice = "pip install --force-reinstall --no-deps layerlens (or pip install -e . in the checkout)"
        return [Finding("compiled kernels", str(error), PROBLEM, advice)]
    forced = os.environ.get("LAYERLENS_ISA")
    note = f" (forced by LAYERLENS_ISA={forced})" if forced else ""
    try:
        found = f"{kernels.isa()}{note}; this machine has {', '.join(kernels.available_isas())}"
    except Exception as error:  # whatever the native probe says is what the reader must see
        return [Finding("compiled kernels", str(error), PROBLEM, "unset LAYERLENS_ISA")]
    return [Finding("compiled kernels", found)]


def _cores() -> Finding:
    from layerlens.utils.threads import THREAD_VARIABLES, available_cores

    usable, present = available_cores(), os.cpu_count() or 1
    given = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ]
    found = f"{usable} of {present} usable" + (f"; {', '.join(given)}" if given else "")
    return Finding("CPU cores", found)


def _memory() -> Finding:
    fields = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields[name] = 1024 * int(value.split()[0])
    except OSError:  # no /proc: only the total is known
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Finding("memory", f"{total / GB:.1f} GB")
    return Finding("memory", f"{fields['MemAvailable'] / GB:.1f} GB free of {fields['MemTotal'] / GB:.1f} GB")


def _cache() -> Finding:
    from layerlens.exceptions import OutputError
    from layerlens.utils.atomic import check_writable
    from layerlens.utils.places import default_cache_dir

    directory = default_cache_dir()
    try:
        check_writable(directory)
    except OutputError as error:
        return Finding("cache", str(error), PROBLEM, "set LAYERLENS_CACHE or runtime.cache_dir, or run with --no-cache")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return Finding("cache", f"{directory}, {size / 1e6:.1f} MB")


def _openmp() -> list[Finding]:
    """Thread pools in this process, once torch and NumPy are loaded; only threadpoolctl can see them."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return []
    for name in ("numpy", "torch"):
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    from threadpoolctl import threadpool_info

    pools = threadpool_info()
    found = ", ".join(f"{pool['prefix']} ({pool['user_api']}, {pool['num_threads']} threads)" for pool in pools)
    openmp = {pool["filepath"] for pool in pools if pool["user_api"] == "openmp"}
    if len(openmp) > 1:
        advice = "they slow each other down when both are busy; set runtime.threads below the number of cores"
        return [Finding("thread pools", f"{len(openmp)} OpenMP runtimes: {found}", HINT, advice)]
    return [Finding("thread pools", found or "none loaded")]
