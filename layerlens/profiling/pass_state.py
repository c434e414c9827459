"""What a pass has accumulated, as named tensors: to keep it in a file, to take it up again, and to add several up.

``sums`` are added elementwise; ``rows`` belong to single samples (kept activations and gradients, kernel features) and
are told apart by how many samples come before them; the ledger has everything that is one number for a batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from layerlens.integrations.placement import input_device
from layerlens.profiling.ledger import BatchRecord, Ledger
from layerlens.profiling.sample_matrices import SampleMatrices
from layerlens.profiling.sketches import SpectrumSketch

if TYPE_CHECKING:
    from layerlens.profiling.accumulators import MatrixAccumulator
    from layerlens.profiling.capture import Capture, Key

FORMAT = "layerlens-pass-3"
TEXT = "text"
FACTORS = ("d__bgto", "z__bgti", "ids__bt", "rows__bti")


@dataclass(frozen=True)
class Matrix:
    """One accumulator: its key, the (g, o, i) of its matrix, and the key of the inputs that it reads."""

    key: Key
    shape: tuple[int, int, int]
    source: Key


@dataclass
class PassState:
    """What some batches add up to.

    Args:
        inputs, matrices: which accumulators there are.
        sums: tensors that are added up, by name; each on the device of its accumulator, and its own memory.
        rows: tensors of single samples, by name.
        ledger: the batches.
        shards: over how many processes the sums of gradients are spread; 1 where they are whole.
    """

    inputs: list[Key] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    shards: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.sums.values(), *self.rows.values()))


def state_of(capture: Capture, ledger: Ledger) -> PassState:
    """The state of a capture; ``sums`` and ``rows`` are its own tensors, not copies."""
    state = PassState(inputs=list(capture.inputs), ledger=ledger, shards=shards_of(capture))
    source_of = {id(inputs): key for key, inputs in capture.inputs.items()}
    for key, inputs in capture.inputs.items():
        if inputs.factor.total is not None:
            state.sums[_name("input", key)] = inputs.factor.total
        if inputs.sketch.total__ik is not None:
            state.sums[_name("input sketch", key)] = inputs.sketch.total__ik
    for key, one in capture.accumulators.items():
        state.matrices.append(Matrix(key, one.shape, source_of[id(one.inputs)]))
        state.sums |= {_name(place, key): tensor for place, tensor in _sums(one)}
        for before, kept in one.kept.items():
            factors = {name: getattr(kept, name) for name in FACTORS}
            state.rows |= {_name(f"{name} {before}", key): x for name, x in factors.items() if x is not None}
    if capture.kernel_sketch is not None:
        state.rows |= {f"kernel {before}": rows for before, rows in capture.kernel_sketch.done.items()}
    return state


def shards_of(capture: Capture) -> int:
    """Over how many processes the sums of gradients are spread."""
    return capture.shards.processes.size if capture.shards else 1


def add_to(capture: Capture, state: PassState) -> None:
    """Add a state's sums and rows to those of ``capture``; its ledger is left to the caller."""
    device = input_device(capture.model)
    add_empty(capture, state.inputs, state.matrices)
    for name, tensor in sorted(state.sums.items()):  # a file has them in no order, and the halves come in theirs
        place, key = _parts(name)
        # Copied to an address as torch allocates it: BLAS may sum in another order where memory is aligned otherwise.
        _add_sum(capture, place, key, tensor.clone().to(device))
    kept: dict[tuple[Key, int], dict[str, torch.Tensor]] = {}
    for name, tensor in state.rows.items():
        place, key = _parts(name)
        part, _, before = place.rpartition(" ")
        if part == "kernel" and capture.kernel_sketch is not None:
            capture.kernel_sketch.done[int(before)] = tensor.clone().to(device)
        else:
            kept.setdefault((key, int(before)), {})[part] = tensor.clone()
    for (key, number), factors in kept.items():
        capture.accumulators[key].kept[number] = SampleMatrices(**factors)


def add_empty(capture: Capture, inputs: list[Key], matrices: list[Matrix]) -> None:
    """Give ``capture`` the accumulators that it lacks."""
    for source in inputs:
        if source not in capture.inputs:
            capture.inputs[source] = capture.new_inputs(source)
    for matrix in matrices:
        if matrix.key not in capture.accumulators:
            one = capture.new_matrix(matrix.key, capture.inputs[matrix.source], matrix.shape)
            capture.accumulators[matrix.key] = one


def add_sum(capture: Capture, name: str, tensor: torch.Tensor) -> None:
    """Add one of the sums, by its name in ``PassState.sums``, taking the tensor itself where there was none."""
    _add_sum(capture, *_parts(name), tensor)


def state_to_bytes(state: PassState) -> bytes:
    """The state as one safetensors file."""
    records = state.ledger.records
    tensors = {f"sum|{name}": tensor.contiguous().cpu() for name, tensor in state.sums.items()}
    tensors |= {f"row|{name}": tensor.contiguous().cpu() for name, tensor in state.rows.items()}
    for number, record in records.items():
        tensors |= {f"index|{number}": record.index, f"loss|{number}": record.losses}
        tensors[f"batch|{number}"] = torch.from_numpy(record.sums)
        if record.labels is not None:
            tensors[f"label|{number}"] = record.labels.contiguous()
    text = {
        "format": FORMAT,
        "shards": state.shards,
        "inputs": state.inputs,
        "matrices": [[one.key, one.shape, one.source] for one in state.matrices],
        "names": list(state.ledger.names),
        "tokens": {number: record.n_tokens for number, record in records.items()},
    }
    tensors[TEXT] = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)
    return save(tensors)


def state_from_bytes(data: bytes) -> PassState | None:
    """What ``state_to_bytes`` made; None for what another version made, or no one did."""
    try:
        tensors = load(data)
        text = json.loads(bytes(tensors.pop(TEXT).numpy()))
        if text["format"] != FORMAT:
            return None
        return _read(tensors, text)
    except (SafetensorError, KeyError, ValueError):
        return None


def _read(tensors: dict[str, torch.Tensor], text: dict[str, Any]) -> PassState:
    ledger = Ledger()
    ledger.names = {name: place for place, name in enumerate(text["names"])}
    for number, n_tokens in text["tokens"].items():
        sums = np.array(tensors[f"batch|{number}"].numpy())
        ledger.records[int(number)] = BatchRecord(
            tensors[f"index|{number}"], tensors[f"loss|{number}"], tensors.get(f"label|{number}"), n_tokens, sums
        )
    return PassState(
        inputs=[_key(key) for key in text["inputs"]],
        matrices=[Matrix(_key(key), (s[0], s[1], s[2]), _key(source)) for key, s, source in text["matrices"]],
        sums={name[4:]: tensor for name, tensor in tensors.items() if name.startswith("sum|")},
        rows={name[4:]: tensor for name, tensor in tensors.items() if name.startswith("row|")},
        ledger=ledger,
        shards=text["shards"],
    )


def _sums(one: MatrixAccumulator) -> Iterator[tuple[str, torch.Tensor]]:
    for half, total in enumerate(one.mean_sums):
        yield f"mean {half}", total
    if one.output_factor.total is not None:
        yield "output", one.output_factor.total
    if one.output_sketch.total__ik is not None:
        yield "output sketch", one.output_sketch.total__ik
    if one.spectrum_sketch is not None:
        yield "right sketch", one.spectrum_sketch.right__hok
        yield "left sketch", one.spectrum_sketch.left__hli


def _add_sum(capture: Capture, place: str, key: Key, tensor: torch.Tensor) -> None:
    if place == "input":
        factor = capture.inputs[key].factor
        factor.total = _plus(factor.total, tensor)
        return
    if place == "input sketch":
        sketch = capture.inputs[key].sketch
        sketch.total__ik = _plus(sketch.total__ik, tensor)
        return
    one = capture.accumulators[key]
    if place == "output":
        one.output_factor.total = _plus(one.output_factor.total, tensor)
    elif place == "output sketch":
        one.output_sketch.total__ik = _plus(one.output_sketch.total__ik, tensor)
    elif place.startswith("mean "):
        half = int(place[5:])
        if half < len(one.mean_sums):
            one.mean_sums[half].add_(tensor)
        else:  # the halves come in their order
            one.mean_sums.append(tensor)
    else:
        if one.spectrum_sketch is None:
            one.spectrum_sketch = SpectrumSketch(one.shape[1], one.shape[2], tensor)
        side = one.spectrum_sketch.right__hok if place == "right sketch" else one.spectrum_sketch.left__hli
        side.add_(tensor)


def _plus(total: torch.Tensor | None, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if total is None else total.add_(tensor)


def _name(place: str, key: Key) -> str:
    return "\t".join((place, *key))


def _parts(name: str) -> tuple[str, Key]:
    place, _, rest = name.partition("\t")
    layer, _, method = rest.partition("\t")
    return place, (layer, method)


def _key(parts: list[str]) -> Key:
    return parts[0], parts[1]
