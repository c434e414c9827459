"""``layerlens run`` once more with nothing changed: the files and figures of the earlier run, and no model is loaded.

A run is kept in the sensitivity cache under its configuration, this machine and its settings. With it is kept the
state (size, times, inode) of all that it read: the model's and the data's files, and every module that the process
had imported. It is taken again where each of these is as it was; the smallest change means an ordinary run.

Only a fresh process asks for it (one that has not imported torch): what a program has registered or replaced in memory
cannot be seen here. Runs whose inputs cannot be told from files are never kept: the user's own functions, models and
data of a hub or a URL, images and sound named by rows, several processes, GPUs.
"""

from __future__ import annotations

import io
import json
import os
import platform
import sqlite3
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from layerlens.config import RunConfig
from layerlens.exceptions import LayerLensError
from layerlens.jobs.job import Warn
from layerlens.jobs.result import CHOICE_FILES, STATISTICS_FILE, RunResult, observed, published
from layerlens.manifest.files import read_document
from layerlens.models import FrozenStage, LayerExplanation, Option
from layerlens.models.data_summary import DataSummary, TokenFigures
from layerlens.profiling.cache import SensitivityCache, cache_key, open_cache
from layerlens.registry import TASKS
from layerlens.storage import local_or_url
from layerlens.utils.atomic import check_writable, staged_directory
from layerlens.utils.launch import place_of_this_process
from layerlens.utils.processor import processor_name
from layerlens.utils.progress import Progress
from layerlens.utils.threads import resolve_threads

VERSION = 1
"""Raise it whenever what is kept of a run is read in another way."""
MOST_BYTES, MOST_FILES = 64 * 2**20, 5000
"""Results beyond this size are not kept, nor those of more input files than can be looked at in a moment."""
JUST_WRITTEN_S = 2.0
"""A file that is younger than this when a run begins may change once more without other times (as with git)."""
SETTINGS = (
    "LAYERLENS_", "HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "CUDA_", "OMP_", "MKL_", "ONEDNN_", "PYTHON", "ATEN_",
    "DNNL_", "OPENBLAS_", "GOMP_", "KMP_", "LD_", "DYLD_", "GLIBC_", "HOME", "XDG_", "LANG", "LC_",
)  # fmt: skip
"""Environment variables that may change what is read or computed begin with one of these (``~`` is HOME)."""
ELSEWHERE = {"output", "telemetry", "tracking", "study"}
"""Sections of the configuration that change no figure."""
TEXT = ("text", "words")
"""Inputs of tasks whose samples are whole in the data's own files."""
MODULES = "modules.json"
"""Of sentence-transformers: what follows a transformer, in folders beside the transformer's."""
FACTS = "facts.json"
UNUSED = "cache: not used"
"""So a run begins to say that it cannot tell the user's code from another version of it (``jobs.own_code``)."""

State = list[int] | None
"""Size, time of change of the content and of the entry in ns, and inode; None where nothing is there."""


def run_or_repeat(
    run: Callable[..., RunResult], config: RunConfig, *, base_dir: Path, use_cache: bool, progress: Progress, warn: Warn
) -> RunResult:
    """What ``run`` gives, or what it gave when nothing that it depends on was different.

    Args:
        run: ``run_config``, which imports torch when it is called.
        config, base_dir, use_cache, progress, warn: of ``run``.

    Raises:
        LayerLensError: that of ``run``, or the output directory cannot be written.
    """
    cache = _cache_of(config, base_dir) if use_cache and _fresh() and _can_be_told(config) else None
    key, started = "", time.time()
    if cache is not None:
        key = run_key(config, base_dir)
        found = _repeated(cache, key, config, base_dir, warn)
        if found is not None:
            return found
    before = None if cache is None else _read_states(config, base_dir)
    result = run(config, base_dir=base_dir, use_cache=use_cache, progress=progress, warn=warn)
    if cache is not None and before is not None and "torch" in sys.modules:
        _keep(cache, key, config, base_dir, result, started, before)
    return result


def _fresh() -> bool:
    """Whether this process is the only one, and has measured nothing yet."""
    return "torch" not in sys.modules and place_of_this_process().size == 1


def run_key(config: RunConfig, base_dir: Path) -> str:
    """What a run is known by, beside the state of what it reads."""
    directory = config.output.directory
    return cache_key(
        {
            "repeated": VERSION,
            "configuration": config.model_dump(mode="json", exclude=ELSEWHERE),
            # the report names the directory where it is a relative one
            "directory": "" if Path(directory).is_absolute() else directory,
            "folder": str(base_dir.resolve()),
            "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(SETTINGS)},
            "python": [sys.version, sys.executable, sys.prefix, sys.flags.optimize],
            "machine": [platform.node(), processor_name(), resolve_threads(config.runtime.threads)],
            "devices": sorted(map(str, Path("/dev").glob("nvidia*"))),
        }
    )


def _cache_of(config: RunConfig, base_dir: Path) -> SensitivityCache | None:
    """The local cache; what is wrong with it, the run itself says."""
    if local_or_url(config.runtime.cache_dir or "")[1] is not None:
        return None
    try:
        return open_cache(config.runtime.cache_dir, base_dir)
    except LayerLensError:
        return None


def _can_be_told(config: RunConfig) -> bool:
    """Whether all that the configuration names can be told from files."""
    model, data = config.model, config.data
    code = model.factory or model.loss or model.weights or model.trust_remote_code or data.collate
    task = TASKS.get(model.task)
    of_text = task is not None and task.inputs in TEXT and task.name != "image-text" and task.load is None
    local = local_or_url(config.output.directory)[1] is None and config.runtime.device == "cpu"
    return not code and of_text and local and config.distributed.sharding == "none"


def _inputs(config: RunConfig, base_dir: Path) -> list[Path] | None:
    """The files and folders of the model and of the data; None where they are elsewhere, or too many."""
    from layerlens.sources import LoadRequest

    request = LoadRequest(config.model.reference, config.model.task, base_dir=base_dir)
    source, url = local_or_url(config.data.source)
    if not request.source.of_transformers or url is not None or local_or_url(request.place)[1] is not None:
        return None
    resolved = Path(request.source.resolve(request))
    if not resolved.is_absolute():  # a hub name
        return None
    # Under the name that was asked for: where a link on the way leads elsewhere later, its files are others.
    asked = base_dir / local_or_url(request.place)[0].expanduser()
    folder = asked if resolved.resolve().is_relative_to(asked.resolve()) else resolved
    roots = [folder.parent if (folder.parent / MODULES).is_file() else folder]
    if not config.data.source.startswith("builtin:"):  # these come with Python and the packages
        roots.append(base_dir / source.expanduser())
    found: list[Path] = []
    for root in roots:
        if not root.exists():
            return None
        found.append(root.absolute())
        for place, folders, files in os.walk(root.absolute(), followlinks=True):
            found += [Path(place) / name for name in (*folders, *files)]
            if len(found) > MOST_FILES:
                return None
    return found


def _code() -> list[Path]:
    """The file of every module of this process, and the folders that packages are installed in."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    folders = {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    return [Path(name) for name in sorted({*filter(None, files), *folders})]


def _devices(cache: SensitivityCache) -> list[Path]:
    """What is known of this machine's devices (``layerlens calibrate``)."""
    return sorted(cache.directory.glob("device-*.json"))


def _read_states(config: RunConfig, base_dir: Path) -> dict[str, State] | None:
    """The states of the model's and the data's files; None where they cannot be told, or the run will say why."""
    try:
        inputs = _inputs(config, base_dir)
    except (OSError, LayerLensError):
        return None
    return None if inputs is None else _states(inputs)


def _states(paths: Iterable[Path]) -> dict[str, State]:
    return {str(path): _state(str(path)) for path in paths}


def _state(path: str) -> State:
    try:
        found = os.stat(path)
    except OSError:
        return None
    if os.path.isdir(path):  # its size and links say nothing more
        return [0, found.st_mtime_ns, 0, found.st_ino]
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _keep(
    cache: SensitivityCache, key: str, config: RunConfig, base_dir: Path, result: RunResult, started: float,
    before: dict[str, State],
) -> None:  # fmt: skip
    """Keep a finished run, unless something that it read has changed meanwhile, or is so young that it may have.

    The time alone would not do: a file server's clock may be behind this machine's.
    """
    read, code = _read_states(config, base_dir), _states(_code())
    if read is None or read != before or any(line.startswith(UNUSED) for line in result.warnings):
        return
    if _newest(read) > started - JUST_WRITTEN_S or _newest(code, folders=False) > started:
        return
    files = {name: path.relative_to(result.directory).as_posix() for name, path in result.files.items()}
    facts = {
        "states": read | code,
        "devices": _states(_devices(cache)),
        "files": files,
        "measured": result.measured,
        "explanations": [asdict(each) for each in result.explanations],
        "frozen": [asdict(each) for each in result.frozen],
        "warnings": result.warnings,
        "data": None if result.data is None else asdict(result.data),
    }
    try:
        content = _packed(facts, result.directory, files.values())
        if len(content) <= MOST_BYTES:
            cache.keep_run(key, content, config.model.reference)
    except (OSError, sqlite3.Error, LayerLensError):  # the result is written; that it is not kept costs time later
        return


def _newest(states: Mapping[str, State], *, folders: bool = True) -> float:
    """Seconds of the last change; of files alone, where folders are written to by running (``__pycache__``)."""
    times = [max(state[1], state[2]) for state in states.values() if state and (folders or state[2])]
    return max(times, default=0) / 1e9


def _packed(facts: dict[str, Any], directory: Path, places: Iterable[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(FACTS, json.dumps(facts))
        for place in places:
            path = directory / place
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    archive.write(file, file.relative_to(directory).as_posix())
    return buffer.getvalue()


def _repeated(cache: SensitivityCache, key: str, config: RunConfig, base_dir: Path, warn: Warn) -> RunResult | None:
    """The kept run written out again; None where there is none, or something is not as it was."""
    try:
        content = cache.kept_run(key)
    except (OSError, sqlite3.Error):
        return None
    if content is None:
        return None
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        facts = json.loads(archive.read(FACTS))
        states = facts["states"]
        if any(_state(path) != state for path, state in states.items()):
            return None
        if _states(_devices(cache)) != facts["devices"]:
            return None
        owned = (*CHOICE_FILES, STATISTICS_FILE)
        begun = time.perf_counter()
        with observed("run", config) as outcome, published(config.output.directory, base_dir, owned) as place:
            check_writable(place.directory)
            with staged_directory(place.directory, owned=owned) as staging:
                archive.extractall(staging, [name for name in archive.namelist() if name != FACTS])
                manifest, made = read_document(staging / facts["files"]["manifest_json"])
            result = RunResult(
                manifest,
                place.directory,
                {name: place.directory / path for name, path in facts["files"].items()},
                statistics_from_cache=True,
                seconds={"repeat": time.perf_counter() - begun},
                measured=facts["measured"],
                explanations=tuple(map(_explanation, facts["explanations"])),
                frozen=tuple(FrozenStage(**each) for each in facts["frozen"]),
                warnings=tuple(facts["warnings"]),
                data=_summary(facts["data"]),
                repeats=made,
            )
            outcome.result = place.publish(result)
    for line in result.warnings:
        warn(line)
    return outcome.result


def _explanation(fields: dict[str, Any]) -> LayerExplanation:
    found = LayerExplanation(**{**fields, "layers": tuple(fields["layers"]), "chosen": Option(**fields["chosen"])})
    other = fields["runner_up"]
    return found if other is None else replace(found, runner_up=Option(**other))


def _summary(fields: dict[str, Any] | None) -> DataSummary | None:
    if fields is None:
        return None
    tokens = fields["tokens"]
    return DataSummary(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        | {
            "left_out": tuple((count, reason) for count, reason in fields["left_out"]),
            "tokens": None if tokens is None else TokenFigures(**tokens),
        }
    )
