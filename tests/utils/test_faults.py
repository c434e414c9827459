"""Every damaged file has a fault of its format's enum, and the page of formats names them all."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from enum import Enum
from pathlib import Path

import pytest

from layerlens.exceptions import ActivationCacheError, LayerLensError, ManifestError
from layerlens.faults import FORMATS, ManifestFault, ModulesFault, StatisticsFault
from layerlens.manifest import read_manifest
from layerlens.profiling.statistics_file import load_statistics

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
GOLDEN = ROOT / "tests/manifest/golden/manifest.json"


@pytest.mark.parametrize("faults", FORMATS.values(), ids=lambda each: each.__name__)
def test_the_page_of_formats_names_every_fault(faults: type[Enum]) -> None:
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    assert f"| `{faults.__name__}` | |" in page
    for fault in faults:
        assert f"| `{fault.name}` | {fault.value} |" in page


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, ManifestFault.MISSING),
        (b"\xff", ManifestFault.NOT_TEXT),
        (b'{"schema_version": "1.0", "a": "\\ud800"}', ManifestFault.NOT_TEXT),
        (b"{", ManifestFault.SYNTAX),
        (b"[]", ManifestFault.SYNTAX),
        (b"[" * 100_000, ManifestFault.SYNTAX),
        (b'{"schema_version": "9"}', ManifestFault.VERSION),
        (b'{"schema_version": "1.0"}', ManifestFault.FIELD),
        (b" " * (64 * 2**20 + 1), ManifestFault.TOO_LARGE),
    ],
)
def test_manifests(content: bytes | None, fault: ManifestFault, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert caught.value.fault is fault


def test_damaged_manifests_and_descriptions_never_fail_otherwise(tmp_path: Path) -> None:
    from mutations import as_json, damaged

    document = json.loads(GOLDEN.read_text(encoding="utf-8"))
    path = tmp_path / "manifest.json"
    found: Counter[object] = Counter()
    for number in range(300):
        path.write_bytes(as_json(damaged(document, random.Random(number))))
        try:
            read_manifest(path)
        except ManifestError as refused:
            found[refused.fault] += 1
        except Exception as other:
            found[f"{number}: {other!r}"] += 1
        else:
            found["sound"] += 1
    assert set(found) <= {*ManifestFault, "sound"}
    assert found["sound"] > 20
    assert found[ManifestFault.FIELD] > 100
    assert found[ManifestFault.NOT_TEXT] > 0


def test_statistics_and_modules(tmp_path: Path) -> None:
    from safetensors.numpy import save

    from layerlens.tuning.storage import _read

    cases = {
        b"no": (StatisticsFault.UNREADABLE, ModulesFault.UNREADABLE),
        save({}, metadata={"layerlens": '{"format": "other"}'}): (StatisticsFault.FORMAT, ModulesFault.UNREADABLE),
        save({}, metadata={"layerlens": '{"format": "layerlens-statistics-4"}'}): (
            StatisticsFault.HEADER, ModulesFault.UNREADABLE
        ),
        save({}, metadata={"layerlens": '{"format": 2, "modules": [], "others": []}'}): (
            StatisticsFault.FORMAT, ModulesFault.DESCRIPTION
        ),
    }  # fmt: skip
    path = tmp_path / "file.safetensors"
    for content, (of_statistics, of_modules) in cases.items():
        path.write_bytes(content)
        with pytest.raises(ActivationCacheError) as caught:
            load_statistics(path)
        assert caught.value.fault is of_statistics
        with pytest.raises(ManifestError) as refused:
            _read(path)
        assert refused.value.fault is of_modules
    with pytest.raises(ManifestError) as missing:
        _read(tmp_path / "none.safetensors")
    assert missing.value.fault is ModulesFault.MISSING


def test_nesting_that_no_parser_follows_is_a_fault_like_any_other(tmp_path: Path) -> None:
    from layerlens.cost.device import load_profile
    from layerlens.evaluation.results import ResultsFile
    from layerlens.profiling.proxies import SavedProxies
    from layerlens.profiling.streamed.on_disk import Journal
    from layerlens.tuning.checkpoints import read_progress
    from layerlens.tuning.served import read_config

    deep = b"[" * 100_000 + b"\n"
    for name in ("adapter_config.json", "device.json", "results.jsonl", "state.json", "progress.json"):
        (tmp_path / name).write_bytes(deep)
    for read in (
        lambda: read_config(tmp_path),
        lambda: load_profile(tmp_path / "device.json"),
        lambda: ResultsFile.open(tmp_path / "results.jsonl"),
        lambda: read_progress(tmp_path),
    ):
        with pytest.raises(LayerLensError):
            read()
    assert Journal(tmp_path).state["forward"] == 0
    assert SavedProxies(lambda: deep, lambda _data: None).restore() == {}
