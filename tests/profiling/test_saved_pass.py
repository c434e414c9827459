"""An interrupted pass is taken up again after its last saved batch and ends with the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from brute_force import pieces
from test_architectures import CASES, spec_of

from layerlens.integrations.weight_matrices import measurable_modules
from layerlens.models import ModelSpec, ModelStatistics
from layerlens.profiling.cache import SensitivityCache, cache_key
from layerlens.profiling.capture import Capture
from layerlens.profiling.measure import measure
from layerlens.profiling.pass_sums import Ledger
from layerlens.profiling.request import BY_SAMPLES, StatisticsRequest
from layerlens.profiling.saved_pass import MAX_BYTES, SavedPass
from layerlens.profiling.statistics_file import statistics_to_bytes
from layerlens.utils.progress import silent

EVERYTHING = BY_SAMPLES
KEY = cache_key({"test": 1})


class StoppedAfter:
    """Progress that is interrupted when ``batches`` batches are done, and counts those that ran."""

    def __init__(self, batches: int) -> None:
        self.left = batches
        self.ran: list[int] = []

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Any]:
        def advance(count: int) -> None:
            self.ran.append(count)
            if description == "Measuring gradients" and count == 1:
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt

        yield advance


def run(saved: SavedPass | None, progress: Any = silent) -> tuple[bytes, ModelStatistics]:
    case = CASES["bert-masked-lm-tied"]
    torch.manual_seed(1)
    model = case.make().float().eval()
    spec = spec_of(model)
    statistics = measure(
        model, spec, pieces(case.batch(), 2, 1, 1, 1), request=StatisticsRequest.of(EVERYTHING), sequence_length=6,
        threads=1, progress=progress, loss=case.loss, other_modules=measurable_modules(model, spec), saved=saved,
    )  # fmt: skip
    return statistics_to_bytes(spec, statistics), statistics


@pytest.mark.parametrize("sketched", [False, True])
def test_a_resumed_pass_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sketched: bool):
    if sketched:  # small as the model is
        monkeypatch.setattr("layerlens.profiling.request.EXACT_NTK_SAMPLES", 2)
        monkeypatch.setattr("layerlens.profiling.accumulators.worth_sketching", lambda shape: shape[0] == 1)
    expected, _ = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(SensitivityCache(tmp_path).saved_pass(KEY, 1.0), StoppedAfter(2))
    again = StoppedAfter(100)
    resumed, _ = run(SensitivityCache(tmp_path).saved_pass(KEY), again)
    assert resumed == expected
    assert again.ran == [2, 1, 1]  # two batches were there, two were left


@pytest.mark.parametrize("damage", ["truncate", "flip", "other version"])
def test_a_damaged_pass_is_measured_from_the_start(tmp_path: Path, damage: str):
    with pytest.raises(KeyboardInterrupt):
        run(SensitivityCache(tmp_path).saved_pass(KEY), StoppedAfter(1))
    (blob,) = (tmp_path / "blobs").iterdir()
    data = bytearray(blob.read_bytes())
    if damage == "other version":
        data = data.replace(b"layerlens-pass-5", b"layerlens-pass-0")
        SensitivityCache(tmp_path).saved_pass(KEY).store.write(0, bytes(data))
    else:
        data[-1] ^= 1
        blob.write_bytes(data if damage == "flip" else data[:-9])
    again = StoppedAfter(100)
    assert run(SensitivityCache(tmp_path).saved_pass(KEY), again)[0] == run(None)[0]
    assert again.ran == [0, 1, 1, 1, 1]


def test_finished_statistics_replace_the_unfinished_pass(tmp_path: Path):
    cache = SensitivityCache(tmp_path)
    _, statistics = run(cache.saved_pass(KEY))
    assert [entry.key for entry in cache.entries()] == [f"{KEY}.partial"]
    cache.put(KEY, spec_of(CASES["bert-masked-lm-tied"].make()), statistics)
    assert [(entry.key, entry.state) for entry in cache.entries()] == [(KEY, "ok")]


class Memory:
    """A store that keeps every write."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def names(self) -> list[int]:
        return []

    def read(self, part: int) -> bytes | None:
        return None

    def write(self, part: int, data: bytes) -> None:
        self.written.append(data)

    def remove(self, parts: Iterable[int]) -> None:
        raise AssertionError(parts)


def test_saving_keeps_to_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(1000))
    monkeypatch.setattr("layerlens.profiling.saved_pass.time.perf_counter", lambda: float(next(clock)))
    memory = Memory()
    saved = SavedPass(memory)
    for _ in range(50):  # each look at the clock takes one second, so a save takes one and the next waits for twenty
        run_state(saved)
    assert 2 <= len(memory.written) <= 4


def test_states_that_are_too_large_are_not_copied(monkeypatch: pytest.MonkeyPatch):
    assert MAX_BYTES == 2 * 1024**3
    monkeypatch.setattr("layerlens.profiling.saved_pass.MAX_BYTES", 10)
    memory = Memory()
    run(SavedPass(memory))
    assert not memory.written


def run_state(saved: SavedPass) -> None:
    """One batch's saving, of an empty capture."""
    saved.after_batch(Capture(torch.nn.Linear(1, 1), ModelSpec("", 2), StatisticsRequest(), 1).sums, Ledger())
