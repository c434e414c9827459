"""The statistics file and the sensitivity cache: exact round trips, and no trust in damaged files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerlens.exceptions import ActivationCacheError, OutputError
from layerlens.models import LayerSpec, LayerStatistics, MethodStatistics, ModelSpec, ModelStatistics
from layerlens.profiling.cache import SensitivityCache, cache_key
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.utils.places import default_cache_dir

SPEC = ModelSpec("m", 100, [LayerSpec("a.b", 4, "linear", n_in=4, n_out=8, methods=("lora", "adapter"), block=0)])


def statistics(seed: int = 0) -> ModelStatistics:
    rng = np.random.default_rng(seed)
    by_method = {
        method: MethodStatistics(*(float(value) for value in rng.random(4)), spectrum=rng.random(3))
        for method in ("lora", "adapter")
    }
    return ModelStatistics((LayerStatistics("a.b", by_method),), 8, 80, 0.1 + 0.2, 12.5, 1e9 / 3, {"é": [1, None]})


def same(one: ModelStatistics, other: ModelStatistics) -> bool:
    return statistics_to_bytes(SPEC, one) == statistics_to_bytes(SPEC, other)


def test_the_file_gives_back_every_bit(tmp_path: Path):
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(statistics_to_bytes(SPEC, statistics()))
    spec, loaded = load_statistics(path)
    assert spec == SPEC
    assert same(loaded, statistics())
    assert loaded.mean_loss == 0.1 + 0.2
    assert loaded.provenance == {"é": [1, None]}


def test_unusable_files_are_named(tmp_path: Path):
    good = statistics_to_bytes(SPEC, statistics())
    cases = {
        "missing.safetensors": (None, "no statistics file"),
        "truncated.safetensors": (good[:-5], "not a readable safetensors file"),
        "text.safetensors": (b"hello", "not a readable safetensors file"),
        "empty.safetensors": (b"", "not a readable safetensors file"),
        "foreign.safetensors": (good.replace(b"layerlens-statistics-4", b"layerlens-statistics-0"), "is not a"),
        "damaged.safetensors": (good.replace(b"n_tokens", b"n_t0kens"), "n_tokens: field required"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ActivationCacheError, match=message):
            load_statistics(path)


def test_the_cache_gives_back_what_it_was_given(tmp_path: Path):
    cache = SensitivityCache(tmp_path)
    key = cache_key({"weights": "abc"})
    assert cache.get(key) is None
    cache.put(key, SPEC, statistics(1))
    cache.put(key, SPEC, statistics(2))
    found = SensitivityCache(tmp_path).get(key)
    assert found is not None
    assert same(found[1], statistics(2))
    assert cache.get(cache_key({"weights": "abd"})) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "foreign"])
def test_a_damaged_blob_counts_as_absent_and_is_replaced(tmp_path: Path, damage: str):
    cache, key = SensitivityCache(tmp_path), cache_key({})
    cache.put(key, SPEC, statistics())
    (blob,) = (tmp_path / "blobs").iterdir()
    data = bytearray(blob.read_bytes())
    if damage == "truncate":
        blob.write_bytes(data[:-3])
    elif damage == "flip":
        data[-1] ^= 1
        blob.write_bytes(data)
    elif damage == "foreign":
        blob.write_bytes(statistics_to_bytes(SPEC, statistics(9)))
    else:
        blob.unlink()
    assert cache.get(key) is None
    cache.put(key, SPEC, statistics())
    found = cache.get(key)
    assert found is not None
    assert same(found[1], statistics())


def test_an_index_that_is_no_database_is_refused_with_advice(tmp_path: Path):
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(OutputError, match=r"runtime\.cache_dir.*--no-cache"):
        SensitivityCache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"runtime\.cache_dir"):
        SensitivityCache(tmp_path / "file" / "below")


@pytest.mark.parametrize("died", ["before the index row", "after it"])
def test_a_run_that_dies_while_it_replaces_a_blob_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died: str
):
    """An unfinished pass is replaced after every batch: all of it would be measured again."""
    cache, key = SensitivityCache(tmp_path), cache_key({})
    cache.put(key, SPEC, statistics(1))

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if died == "after it":
            patched.setattr("layerlens.profiling.cache._moved", die)
        else:
            patched.setattr(cache, "_index", die)
        with pytest.raises(KeyboardInterrupt):
            cache.put(key, SPEC, statistics(2))
    assert [entry.state for entry in SensitivityCache(tmp_path).entries()] == ["ok"]
    found = SensitivityCache(tmp_path).get(key)
    assert found is not None
    assert same(found[1], statistics(2 if died == "after it" else 1))
    cache.remove([key])
    assert list((tmp_path / "blobs").iterdir()) == []


def _write_many(directory: Path, start: int) -> None:
    cache = SensitivityCache(directory)
    for number in range(start, start + 1_000_000):
        cache.put(cache_key({"n": number % 8}), SPEC, statistics(number % 8))


def test_two_writers_and_a_kill_leave_a_cache_that_is_right(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, start)) for start in (0, 4)]
    for writer in writers:
        writer.start()
    cache = SensitivityCache(tmp_path)
    deadline = time.monotonic() + 20
    while any(cache.get(cache_key({"n": n})) is None for n in range(8)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for writer in writers:
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    for number in range(8):
        found = cache.get(cache_key({"n": number}))
        if found is not None:  # killed between blob and index row: absent, never wrong
            assert same(found[1], statistics(number))
        cache.put(cache_key({"n": number}), SPEC, statistics(number))
        found = cache.get(cache_key({"n": number}))
        assert found is not None
        assert same(found[1], statistics(number))


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path / "here"))
    assert default_cache_dir() == tmp_path / "here"
    monkeypatch.delenv("LAYERLENS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "layerlens"
