"""Reads damaged files of every format of LayerLens, and counts what is not an error of LayerLens.

    python benchmarks/mutated_files.py --count 100000 --out benchmarks/results/mutated_files.json

A small job makes sound files. Each is damaged in its values, its structure or its bytes (``mutations``), and read as
the commands read it. What is still sound is used: shown, compared, solved. An exception that is no ``LayerLensError``
is what a user sees as "unexpected"; each kind is kept with the file that made it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml
from mutations import as_json, damaged, damaged_bytes, damaged_safetensors
from small_job import make_job

from layerlens.exceptions import LayerLensError

SHARES = {"manifest.json": 25, "manifest.yaml": 10, "statistics.safetensors": 25, "config.yaml": 25, "modules": 7,
          "peft": 3, "sweep": 2, "device": 1, "journal": 1, "proxies": 1}  # fmt: skip
"""How many of a hundred files are of each format."""


@dataclass
class Tally:
    """What became of the files of one format."""

    sound: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    unexpected: dict[str, dict[str, Any]] = field(default_factory=dict)


def main() -> None:
    """Damage and read; exit code 1 where anything was unexpected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="Stop after this time, with what was reached."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SHARES)
    parser.add_argument("--keep", type=Path, help="Keep the files that made something unexpected here.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="layerlens-") as name:
        folder = Path(name)
        readers = _readers(make_job(folder), folder)
        tallies = {}
        for kind, share in SHARES.items():
            if arguments.only in (None, kind):
                count = arguments.count if arguments.only else arguments.count * share // 100
                limit = time.perf_counter() + arguments.seconds * (1 if arguments.only else share / 100)
                tallies[kind] = _try(kind, count, limit, arguments.seed, *readers[kind], folder, arguments.keep)
                print(kind, tallies[kind].sound, dict(tallies[kind].refused), flush=True)
                for key, found in tallies[kind].unexpected.items():
                    print("   unexpected:", found["count"], key)
    result = {
        "files": sum(tally.sound + tally.refused.total() for tally in tallies.values()),
        "unexpected": sum(found["count"] for tally in tallies.values() for found in tally.unexpected.values()),
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - begun, 1),
        "formats": {
            kind: {"sound": tally.sound, "refused": dict(sorted(tally.refused.items())), "unexpected": tally.unexpected}
            for kind, tally in tallies.items()
        },
    }
    print(result["files"], "files,", result["unexpected"], "unexpected,", result["seconds"], "s")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(bool(result["unexpected"]))


Make, Read = Callable[[Random], bytes], Callable[[Path, Random], None]


def _try(
    kind: str, count: int, limit: float, seed: int, name: str, make: Make, read: Read, folder: Path, keep: Path | None
) -> Tally:  # fmt: skip
    tally = Tally()
    path = folder / "damaged" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    for number in range(count):
        if time.perf_counter() > limit:
            break
        chance = Random(f"{kind} {seed} {number}")
        data = make(chance)
        path.write_bytes(data)
        try:
            read(path, chance)
        except LayerLensError as error:
            tally.refused[_fault(error)] += 1
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            ours = [one for one in traceback.extract_tb(error.__traceback__) if "/layerlens/" in one.filename]
            at = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else Path(frame.filename).name
            key = f"{type(error).__name__} in {at}"
            tally.refused["unexpected"] += 1
            found = tally.unexpected.setdefault(key, {"count": 0, "first": number, "message": str(error)[:200]})
            found["count"] += 1
            if keep is not None and found["count"] == 1:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{kind}-{number}-{name}").write_bytes(data)
        else:
            tally.sound += 1
    return tally


def _fault(error: LayerLensError) -> str:
    fault = getattr(error, "fault", None)
    return type(error).__name__ if fault is None else f"{type(error).__name__}: {fault.name}"


def _readers(job: Path, folder: Path) -> dict[str, tuple[str, Make, Read]]:
    """format -> the name of its file, what makes a damaged one, and what reads and uses it."""
    from layerlens.config.loader import load_run_config
    from layerlens.cost.device import load_profile
    from layerlens.jobs.sweep import SweepTask, read_tasks
    from layerlens.profiling.proxies import SavedProxies
    from layerlens.profiling.streamed.on_disk import Journal

    manifest = json.loads((job / "out/manifest.json").read_bytes())
    as_yaml = (job / "out/manifest.yaml").read_bytes()
    config = yaml.safe_load((job / "config.yaml").read_bytes())
    statistics = (job / "out/statistics.safetensors").read_bytes()
    modules = (job / "out/layerlens_modules.safetensors").read_bytes()
    adapter = json.loads((job / "out/peft/adapter_config.json").read_bytes())
    user = _User(job)

    def either(document: Any, dump: Callable[[Any], bytes], text: bytes) -> Make:
        return lambda chance: dump(damaged(document, chance)) if chance.random() < 0.8 else damaged_bytes(text, chance)

    def yaml_bytes(document: Any) -> bytes:
        try:
            return yaml.dump(document, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True).encode(
                "utf-8", "surrogatepass"
            )
        except (yaml.YAMLError, UnicodeEncodeError):  # half a character
            return as_json(document)

    task = {"task": 0, "name": "a", "settings": {"runtime.seed": 1}, "config": "a.yaml", "base_dir": ".",
            "directory": "d", "measures": "0", "command": "layerlens"}  # fmt: skip
    assert SweepTask(**task)
    device = {
        "format": "",
        "device": "cpu",
        "threads": 1,
        "torch": "2",
        "rates": {"matmul": {"flops": 1e9, "bytes": 1e9}},
    }
    state = {"format": "", "forward": 1, "backward": 0, "facts": {"a": [1, 2]}}
    from layerlens.cost import device as device_module
    from layerlens.profiling.proxies import FORMAT as PROXIES
    from layerlens.profiling.streamed import on_disk

    device["format"], state["format"] = device_module.FORMAT, on_disk.FORMAT
    proxies = {"format": PROXIES, "study": None, "joint": None}

    class Tasks:
        directory = folder / "damaged"
        path = folder / "sweep.yaml"

    def from_statistics(chance: Random) -> bytes:
        return damaged_safetensors(statistics, "layerlens", chance)

    def from_modules(chance: Random) -> bytes:
        return damaged_safetensors(modules, "layerlens", chance)

    def read_config(path: Path, _chance: Random) -> None:
        user.config(load_run_config(path))

    return {
        "manifest.json": ("manifest.json", either(manifest, as_json, as_json(manifest)), user.manifest),
        "manifest.yaml": ("manifest.yaml", either(manifest, yaml_bytes, as_yaml), user.manifest),
        "statistics.safetensors": ("statistics.safetensors", from_statistics, user.statistics),
        "config.yaml": ("config.yaml", either(config, yaml_bytes, yaml_bytes(config)), read_config),
        "modules": ("layerlens_modules.safetensors", from_modules, user.modules),
        "peft": ("adapter_config.json", either(adapter, as_json, as_json(adapter)), user.peft),
        "sweep": ("tasks.jsonl", either(task, as_json, as_json(task)), lambda _path, _chance: read_tasks(Tasks)),
        "device": ("device.json", either(device, as_json, as_json(device)), lambda path, _: load_profile(path)),
        "journal": ("state.json", either(state, as_json, as_json(state)), lambda path, _: Journal(path.parent)),
        "proxies": (
            "proxies.json", either(proxies, as_json, as_json(proxies)),
            lambda path, _: SavedProxies(path.read_bytes, lambda _data: None).restore(),
        ),
    }  # fmt: skip


class _User:
    """Uses files as the commands do."""

    def __init__(self, job: Path) -> None:
        from layerlens.config.loader import load_run_config
        from layerlens.manifest import read_manifest

        self.job = job
        self.run_config = load_run_config(job / "config.yaml")
        self.other = read_manifest(job / "out/manifest.json")
        self.device = os.open(os.devnull, os.O_WRONLY)

    def manifest(self, path: Path, chance: Random) -> None:
        """Shown, compared, and its configuration taken up."""
        from layerlens.cli import output
        from layerlens.cli.commands_show import _show_manifest
        from layerlens.jobs.recorded import config_of
        from layerlens.jobs.train import train_config
        from layerlens.manifest import read_document
        from layerlens.manifest.difference import Difference
        from layerlens.manifest.files import to_document
        from layerlens.manifest.summary import budget_facts, peft_holds, predicted_gain, proof, share_of_model

        manifest, created_at = read_document(path)
        json.dumps({**manifest.fields()}, default=str).encode()
        to_document(manifest, created_at)
        str(Difference.of(manifest, self.other, ("a", "b")))
        str(Difference.of(self.other, manifest, ("a", "b")))
        for use in manifest.resources:
            budget_facts(use)
        (peft_holds(manifest), predicted_gain(manifest), proof(manifest), share_of_model(manifest), manifest.choice)
        for take in (config_of, train_config):
            with contextlib.suppress(LayerLensError):
                take(manifest)
        if chance.random() < 0.1:
            output.state.live = _silent()
            _show_manifest(manifest, created_at, path)

    def statistics(self, path: Path, chance: Random) -> None:
        """Solved and explained."""
        from layerlens.jobs.find import find_allocation
        from layerlens.jobs.solve import option_tables
        from layerlens.pipeline import optimize_statistics
        from layerlens.profiling.finite import refuse_non_finite
        from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes

        spec, statistics = load_statistics(path)
        refuse_non_finite(statistics)
        statistics_to_bytes(spec, statistics)
        if chance.random() < 0.3:
            utilities, costs = option_tables(spec, statistics, self.run_config)
            find_allocation(spec, utilities, costs, self.run_config.optimization, seed=0, threads=1)
        if chance.random() < 0.02:
            optimize_statistics(path, self.run_config, base_dir=path.parent)

    def config(self, config: Any) -> None:
        """Written and read again."""
        from layerlens.config.loader import parse_run_config

        parse_run_config(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False))

    def modules(self, path: Path, _chance: Random) -> None:
        """Put into a model."""
        from layerlens.tuning.storage import read_modules

        read_modules(self._base(), path)

    def peft(self, path: Path, _chance: Random) -> None:
        """Read for a server, beside sound weights."""
        from layerlens.tuning.served import read_adapter

        weights = path.parent / "adapter_model.safetensors"
        if not weights.exists():
            weights.write_bytes((self.job / "out/peft/adapter_model.safetensors").read_bytes())
            (path.parent / "layerlens_modules.safetensors").unlink(missing_ok=True)
        read_adapter(path.parent)

    def _base(self) -> Any:
        if not hasattr(self, "_model"):
            from layerlens.sources.source import LoadRequest

            request = LoadRequest(str(self.job / "model"), "sequence-classification")
            self._model = request.source.load(request).model
        return self._model


def _silent() -> Any:
    from rich.console import Console

    return Console(file=open(os.devnull, "w"), width=200)


if __name__ == "__main__":
    main()
