"""``doctor``: whether LayerLens can work here, what is missing, and the line that gets it.

It looks at Python, packages (by the requirements in LayerLens's own metadata), kernels, cores, memory, cache and GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from layerlens import __version__
from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.places import Debug, Json

STYLES = {"ok": ("✓", "green"), "hint": ("!", "yellow"), "problem": ("✗", "bold red")}


@guarded()
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Check Python, packages, kernels, cores, memory and cache. Exits with 1 if something needs repair."""

    findings = examine()
    if json:
        from dataclasses import asdict

        output.json_result({"findings": [asdict(finding) for finding in findings]})
    else:
        _show(findings)
    if any(finding.status == PROBLEM for finding in findings):
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for finding in findings:
        mark, style = STYLES[finding.status]
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style=style)
        table.add_row(Text(mark, style=style), Text(finding.subject), text)
    output.console().print(table)


OK, HINT, PROBLEM = "ok", "hint", "problem"
GB = 1e9
NVIDIA = Path("/proc/driver/nvidia/version")
POOL = re.compile(r"(?P<openmp>lib[gi]?omp5?)|libmkl_rt|lib(?:scipy_)?openblas\w*|libblis")


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
    return [_python(), *_packages(), *_torchvision(), *_kernels(), _cores(), _memory(), *_gpu(), _cache(), *_openmp()]


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


def _torchvision() -> list[Finding]:
    """A torchvision that was built for another torch, beside which ``import transformers`` fails outside LayerLens."""
    from layerlens.integrations.torchvision_import import make_torchvision_importable

    if importlib.util.find_spec("torch") is None or not make_torchvision_importable():
        return []
    torch, torchvision = (importlib.import_module(name) for name in ("torch", "torchvision"))
    if torchvision.extension._has_ops():
        return []
    found = (
        f"{torchvision.__version__} was built for another torch than {torch.__version__}; LayerLens works, but a plain "
        "`import transformers` fails"
    )
    build = torch.__version__.partition("+")[2]  # cpu, cu130, rocm6.4: PyTorch's index has a folder for each
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return [Finding("torchvision", found, HINT, f"pip install --force-reinstall --no-deps torchvision{index}")]


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
    from layerlens.utils.free_memory import MEMINFO, available_bytes, meminfo

    total = meminfo(MEMINFO).get("MemTotal")
    if total is None:  # no /proc: only the total is known
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Finding("memory", f"{total / GB:.1f} GB")
    return Finding("memory", f"{available_bytes() / GB:.1f} GB free of {total / GB:.1f} GB")


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


def _gpu() -> list[Finding]:
    """GPUs that torch can use; what is missing where there is one that it cannot."""
    if importlib.util.find_spec("torch") is None:
        return []  # told among the packages
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            known = torch.cuda.get_device_properties(index)
            names.append(f"{known.name}, {known.total_memory / GB:.1f} GB")
        return [Finding("GPU", f"{'; '.join(names)} (CUDA {torch.version.cuda}); runtime.device: cuda uses it")]
    if NVIDIA.exists() and torch.version.cuda is None:
        advice = "install torch's CUDA build: https://pytorch.org/get-started/locally"
        return [Finding("GPU", f"one is there, but torch {torch.__version__} is built for the CPU only", HINT, advice)]
    if NVIDIA.exists():
        advice = "update the driver, or install the torch that was built for its CUDA"
        return [Finding("GPU", f"one is there, but torch's CUDA {torch.version.cuda} cannot use it", HINT, advice)]
    return [Finding("GPU", "none")]


def _openmp() -> list[Finding]:
    """BLAS and OpenMP runtimes in this process, once NumPy, torch and the kernels are loaded."""
    for name in ("numpy", "torch", "layerlens.kernels"):
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    pools = _thread_pools()
    if not pools:
        return []  # neither Linux nor threadpoolctl
    found = ", ".join(told for told, _ in pools.values())
    openmp = [path for path, (_, is_openmp) in pools.items() if is_openmp]
    if len(openmp) > 1:
        advice = "they slow each other down if both are busy; set runtime.threads below the number of cores"
        return [Finding("thread pools", f"{len(openmp)} OpenMP runtimes: {found}", HINT, advice)]
    return [Finding("thread pools", found)]


def _thread_pools() -> dict[str, tuple[str, bool]]:
    """File of each library with a pool of threads -> (what to say of it, whether it is OpenMP)."""
    if importlib.util.find_spec("threadpoolctl") is not None:
        from threadpoolctl import threadpool_info

        return {
            pool["filepath"]: (
                f"{pool['prefix']} ({pool['user_api']}, {pool['num_threads']} threads)",
                pool["user_api"] == "openmp",
            )
            for pool in threadpool_info()
        }
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    files = sorted({line.split(maxsplit=5)[5] for line in lines if line.count("/")})
    found = {path: POOL.match(Path(path).name) for path in files}
    return {
        path: (f"{match[0]} ({'openmp' if match['openmp'] else 'blas'})", bool(match["openmp"]))
        for path, match in found.items()
        if match
    }


_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?(?P<limits>[^;]*)(?:;(?P<marker>.*))?")


_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


_AT_LEAST = re.compile(r">=\s*([0-9][0-9.]*)")


DEVELOPERS = ("test", "dev")


@dataclass(frozen=True)
class Requirement:
    """One package that LayerLens, or one of its extras, needs.

    Args:
        name: name on PyPI.
        extra: extra that asks for it; "" for what every installation needs.
        wanted: lowest version that will do ("" for any).
        found: installed version; None where it is missing.
    """

    name: str
    extra: str
    wanted: str
    found: str | None

    @property
    def satisfied(self) -> bool:
        """It is installed, in a version that will do."""
        return self.found is not None and _numbers(self.found) >= _numbers(self.wanted)


def requirements() -> list[Requirement] | None:
    """Everything that the core and its extras need, developers' extras left out; None if not installed."""
    from importlib import metadata

    try:
        lines = metadata.requires("layerlens") or []
    except metadata.PackageNotFoundError:
        return None
    return parse_requirements(lines)


def parse_requirements(lines: Sequence[str]) -> list[Requirement]:
    """Requirements from the lines of a distribution's metadata, such as ``peft>=0.18; extra == "hf"``."""
    found = []
    for line in lines:
        match = _REQUIREMENT.match(line)
        extra = _EXTRA.search(line)
        if match is None or match["name"].lower() == "layerlens" or (extra and extra[1] in DEVELOPERS):
            continue
        limit = _AT_LEAST.search(match["limits"])
        wanted = limit[1] if limit else ""
        found.append(Requirement(match["name"], extra[1] if extra else "", wanted, _version(match["name"])))
    return found


def pip_line(missing: Sequence[Requirement]) -> str:
    """The command that installs what is missing."""
    extras = sorted({requirement.extra for requirement in missing if requirement.extra})
    return f"pip install 'layerlens[{','.join(extras)}]'" if extras else "pip install --upgrade layerlens"


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0): enough to compare releases."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
