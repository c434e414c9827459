"""A streamed profile that was interrupted goes on at the block where it was, and ends with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from streamed_support import save

from layerlens.exceptions import ActivationCacheError, ProfilingError
from layerlens.profiling.cache import SensitivityCache
from layerlens.profiling.streamed.parts import ModelParts

N_BATCHES = 3


class StoppedAt:
    """Progress that is interrupted when ``count`` batches of ``stage`` are done."""

    def __init__(self, stage: str, count: int) -> None:
        self.wanted, self.left = stage, count

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Any]:
        def advance(count: int = 1) -> None:
            if description == self.wanted and count:
                self.left -= count
                if self.left <= 0:
                    raise KeyboardInterrupt

        yield advance


def count_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the blocks as they run from now on."""
    ran: list[int] = []
    run_block = ModelParts.run_block

    def counted(parts: ModelParts, number: int, *arguments: Any) -> Any:
        ran.append(number)
        return run_block(parts, number, *arguments)

    monkeypatch.setattr(ModelParts, "run_block", counted)
    return ran


# Two blocks; 3 batches, and the footprint's, which runs each block twice; a block runs twice more before its gradients,
# on two samples and on the same two exchanged, to see which rows are of which sample. What is done does not run again.
@pytest.mark.parametrize(
    ("stage", "count", "blocks_left"),
    [
        ("Running embeddings", 2, {0: 5 + 5, 1: 5 + 5}),
        ("Running blocks", N_BATCHES + 1, {1: 5 + 5, 0: 5}),
        ("Measuring gradients", 2, {1: 5, 0: 5}),
        ("Measuring gradients", 2 * N_BATCHES + 1, {0: 5}),
    ],
)
@pytest.mark.parametrize("sketched", [False, True])
def test_a_resumed_profile_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, count: int, blocks_left: dict[int, int], sketched: bool
):
    if sketched:
        monkeypatch.setattr("layerlens.profiling.request.EXACT_NTK_SAMPLES", 2)
        monkeypatch.setattr("layerlens.profiling.accumulators.worth_sketching", lambda shape: shape[0] == 1)
    saved = save("llama-causal-gqa", tmp_path / "model")
    directory = tmp_path / "stream"
    with pytest.raises(KeyboardInterrupt):
        saved.streamed(progress=StoppedAt(stage, count), directory=directory)
    assert directory.is_dir()
    ran = count_blocks(monkeypatch)
    assert saved.streamed(directory=directory) == saved.in_memory()
    assert {number: ran.count(number) for number in set(ran)} == blocks_left
    assert not directory.exists()


def test_an_interrupted_profile_leaves_the_model_as_it_was(tmp_path: Path):
    saved = save("llama-causal-gqa", tmp_path / "model")
    skeleton, weights = saved.skeleton()
    from layerlens.profiling.streamed.measure_streamed import measure_streamed

    settings = saved.settings(("gradient",), everything=False, progress=StoppedAt("Running blocks", 1))
    with pytest.raises(KeyboardInterrupt):
        measure_streamed(skeleton, weights, saved.spec, saved.batches, **settings)
    assert all(x.is_meta for x in skeleton.parameters())
    assert not any("forward" in vars(module) for module in skeleton.modules())


def test_lost_results_are_told_and_another_profile_is_not_taken_up(tmp_path: Path):
    saved = save("llama-causal-gqa", tmp_path / "model")
    directory = tmp_path / "stream"
    with pytest.raises(KeyboardInterrupt):
        saved.streamed(progress=StoppedAt("Measuring gradients", 2 * N_BATCHES + 1), directory=directory)
    whole = saved.batches
    saved.batches = whole[:2]  # other boundaries: begun anew
    assert saved.streamed(directory=directory) == saved.in_memory()
    saved.batches = whole
    with pytest.raises(KeyboardInterrupt):
        saved.streamed(progress=StoppedAt("Measuring gradients", 2 * N_BATCHES + 1), directory=directory)
    (directory / "1.safetensors").write_bytes(b"damaged")
    with pytest.raises(ProfilingError, match="the results of block 1 are gone"):
        saved.streamed(directory=directory)


def test_the_cache_lists_an_unfinished_stream_and_removes_it_unless_it_is_running(tmp_path: Path):
    saved = save("llama-causal-gqa", tmp_path / "model")
    cache = SensitivityCache(tmp_path / "cache")
    directory = cache.stream_directory("0" * 64)

    class AsksTheCache(StoppedAt):
        @contextmanager
        def stage(self, description: str, total: int | None = None) -> Iterator[Any]:
            if description == "Running blocks":
                with pytest.raises(ActivationCacheError, match="running profile"):
                    cache.remove([entry.key for entry in cache.entries()])
            with super().stage(description, total) as advance:
                yield advance

    with pytest.raises(KeyboardInterrupt):
        saved.streamed(progress=AsksTheCache("Running blocks", N_BATCHES + 1), directory=directory)
    (entry,) = cache.entries()
    assert (entry.key, entry.state) == ("0" * 64 + ".stream", "ok")
    assert entry.bytes > 0
    cache.remove([entry.key])
    assert not directory.exists()
