"""A pass over the calibration data that can be taken up again: what has been accumulated after some batches, as bytes.

An interrupted profile continues after the last batch that was saved and ends with the same bits, since all sums go on
in the same order. Saving takes at most a twentieth of the time, so small models are saved after every batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from layerlens.profiling.capture import Capture
from layerlens.profiling.gram_sum import GramSum
from layerlens.profiling.sample_matrices import SampleMatrices
from layerlens.profiling.sketches import FactorSum, SpectrumSketch

FORMAT = "layerlens-pass-2"
SCALARS = "scalars"
SHARE_OF_TIME = 0.05
MAX_BYTES = 2**31
"""Larger states are not saved: they are copied in memory on the way to the disk."""

FACTORS = ("d__bgto", "z__bgti", "ids__bt", "rows__bti")


class SavedPass:
    """Where a pass is kept between interruption and resumption.

    Args:
        read: what was written last, None when there is nothing or it is damaged.
        write: keeps bytes in place of what was kept.
    """

    def __init__(self, read: Callable[[], bytes | None], write: Callable[[bytes], None]) -> None:
        self.read = read
        self.write = write
        self._last_end = time.perf_counter()
        self._last_cost = 0.0

    def restore(self, capture: Capture) -> tuple[int, list[torch.Tensor]]:
        """Put what was kept into ``capture``; the batches that are done, and the losses of their samples."""
        data = self.read()
        if data is None:
            return 0, []
        try:
            tensors = load(data)
            scalars = json.loads(bytes(tensors.pop(SCALARS).numpy()))
        except (SafetensorError, KeyError, ValueError):  # of another version: measured from the start
            return 0, []
        if scalars["format"] != FORMAT:
            return 0, []
        _restore(capture, tensors, scalars)
        return scalars["n_batches"], [tensors[f"loss|{index}"] for index in range(scalars["n_batches"])]

    def after_batch(self, capture: Capture, losses: list[torch.Tensor]) -> None:
        """Keep the state after these batches, unless that would take more than its share of the time."""
        start = time.perf_counter()
        if start - self._last_end < self._last_cost / SHARE_OF_TIME:
            return
        if any(one.kept and not one.kept[0].on_host for one in capture.accumulators.values()):
            return  # activations stay on their device
        tensors, scalars = _state(capture)
        if sum(tensor.nbytes for tensor in tensors.values()) > MAX_BYTES:
            return
        tensors |= {f"loss|{index}": loss.cpu() for index, loss in enumerate(losses)}
        scalars |= {"format": FORMAT, "n_batches": len(losses)}
        tensors[SCALARS] = torch.frombuffer(bytearray(json.dumps(scalars).encode()), dtype=torch.uint8)
        self.write(save(tensors))
        self._last_end = time.perf_counter()
        self._last_cost = self._last_end - start


def _state(capture: Capture) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    inputs: list[dict[str, Any]] = []
    for index, (source, found) in enumerate(capture.inputs.items()):
        inputs.append(
            {
                "source": source, "n_tokens": found.n_tokens, "square_sum": found.square_sum,
                "sketched_trace": found.sketch.trace,
            }
        )  # fmt: skip
        if found.sketch.total__ik is not None:
            tensors[f"input sketch|{index}"] = found.sketch.total__ik.cpu()
        if found.factor.total is not None:
            tensors[f"input|{index}"] = found.factor.total.cpu()
    sources = {id(found): index for index, found in enumerate(capture.inputs.values())}
    matrices: list[dict[str, Any]] = []
    for index, (key, one) in enumerate(capture.accumulators.items()):
        matrices.append(
            {
                "key": key, "shape": one.shape, "inputs": sources[id(one.inputs)], "n_samples": one.n_samples,
                "trace_sum": one.trace_sum, "n_means": len(one.mean_sums), "n_kept": len(one.kept),
                "sketched_trace": one.output_sketch.trace,
            }
        )  # fmt: skip
        tensors |= {f"mean|{index}|{half}": total.cpu() for half, total in enumerate(one.mean_sums)}
        if one.output_factor.total is not None:
            tensors[f"output|{index}"] = one.output_factor.total.cpu()
        if one.output_sketch.total__ik is not None:
            tensors[f"output sketch|{index}"] = one.output_sketch.total__ik.cpu()
        if one.spectrum_sketch is not None:
            tensors[f"right sketch|{index}"] = one.spectrum_sketch.right__hok.cpu()
            tensors[f"left sketch|{index}"] = one.spectrum_sketch.left__hli.cpu()
        for number, kept in enumerate(one.kept):
            found_factors = {name: getattr(kept, name) for name in FACTORS}
            tensors |= {
                f"kept|{index}|{number}|{name}": x.contiguous() for name, x in found_factors.items() if x is not None
            }
    if capture.kernel_sketch is not None:
        tensors |= {f"kernel|{number}": x.cpu() for number, x in enumerate(capture.kernel_sketch.done)}
    return tensors, {"inputs": inputs, "matrices": matrices}


def _restore(capture: Capture, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
    device = next(capture.model.parameters()).device
    # Copied to addresses as torch allocates them: BLAS may sum in another order where memory is aligned otherwise.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def gram_sum(name: str) -> GramSum:
        found = GramSum()
        found.total = tensors[name].to(device) if name in tensors else None
        return found

    def factor_sum(name: str, trace: float) -> FactorSum:
        found = FactorSum()
        found.total__ik = tensors[name].to(device) if name in tensors else None
        found.trace = trace
        return found

    if capture.kernel_sketch is not None:
        names = sorted((name for name in tensors if name.startswith("kernel|")), key=lambda name: int(name[7:]))
        capture.kernel_sketch.done = [tensors[name].to(device) for name in names]
    sources = []
    for index, content in enumerate(scalars["inputs"]):
        inputs = capture.new_inputs(tuple(content["source"]))
        inputs.sketch = factor_sum(f"input sketch|{index}", content["sketched_trace"])
        inputs.n_tokens, inputs.square_sum = content["n_tokens"], content["square_sum"]
        inputs.factor = gram_sum(f"input|{index}")
        capture.inputs[tuple(content["source"])] = inputs
        sources.append(inputs)
    for index, content in enumerate(scalars["matrices"]):
        one = capture.new_matrix(tuple(content["key"]), sources[content["inputs"]], tuple(content["shape"]))
        one.output_sketch = factor_sum(f"output sketch|{index}", content["sketched_trace"])
        if f"right sketch|{index}" in tensors:
            right, left = (tensors[f"{side} sketch|{index}"].to(device) for side in ("right", "left"))
            one.spectrum_sketch = SpectrumSketch(right.shape[1], left.shape[2], right)
            one.spectrum_sketch.right__hok, one.spectrum_sketch.left__hli = right, left
        one.n_samples, one.trace_sum = content["n_samples"], content["trace_sum"]
        one.mean_sums = [tensors[f"mean|{index}|{half}"].to(device) for half in range(content["n_means"])]
        one.output_factor = gram_sum(f"output|{index}")
        one.kept = [
            SampleMatrices(**{name: tensors.get(f"kept|{index}|{number}|{name}") for name in FACTORS})
            for number in range(content["n_kept"])
        ]
        capture.accumulators[tuple(content["key"])] = one
