"""Which tensors a statistics file may have: name, dtype, axes, and whether all of their values are finite.

The declaration follows from the header, so that a file is compared with it before the first tensor is read: safetensors
has dtypes that NumPy cannot read at all, and others that would pass for what they are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerlens.exceptions import ActivationCacheError
from layerlens.models import MethodStatistics
from layerlens.models.statistics import FACTOR, SKETCH, SPECTRUM
from layerlens.models.step import StepRecord
from layerlens.registry import STATISTICS

FLOAT64, FLOAT32 = "F64", "F32"
GRAM, MODEL, HEAD, STEP = "kernel|gram", "model", "head", "step"
HEAD_DTYPES = {"float32": FLOAT32, "float64": FLOAT64, "int64": "I64"}
"""Of weights and counters of a task head."""
SPECTRA = MethodStatistics.names_of(SPECTRUM)
FACTORS = MethodStatistics.names_of(FACTOR)
SKETCHES = MethodStatistics.names_of(SKETCH)


@dataclass(frozen=True)
class DeclaredTensor:
    """What one tensor must be.

    Args:
        dtype: as safetensors writes it.
        axes: a letter for each axis; those of one letter are of one length in a ``group``. None: any shape.
        group: what its letters are compared in.
        required: whether the file must have it.
        finite: whether NaN and infinity are refused.
    """

    dtype: str
    axes: str | None
    group: str
    required: bool = True
    finite: bool = True


def must_be_finite(name: str) -> bool:
    """Whether NaN and infinity are refused in a value; a statistic may say that they are not in its own."""
    statistic = name.partition(".")[0]
    return statistic not in STATISTICS or bool(STATISTICS[statistic].finite)


def declared_tensors(content: Mapping[str, Any]) -> dict[str, DeclaredTensor]:
    """All tensors that a file with this header may have, by name."""
    found: dict[str, DeclaredTensor] = {}
    for entry in content["layers"]:
        for method, scalars in entry["methods"].items():
            found |= _of_matrix(f"{entry['layer']}|{method}", scalars)
    for name, scalars in content["other_weights"].items():
        found |= _of_matrix(f"{name}|weight", scalars)
    if content["kernel"] is not None:
        found[GRAM] = DeclaredTensor(FLOAT64, "nn", GRAM)
    for name, dtype in content.get("head", {}).items():
        if dtype not in HEAD_DTYPES.values():
            raise ActivationCacheError(f"tensor {name!r} of the task head has dtype {dtype!r}, which no head has")
        found[f"{HEAD}|{name}"] = DeclaredTensor(dtype, None, HEAD)
    if content.get("step") is not None:
        found |= {
            f"{STEP}|{name}": DeclaredTensor(FLOAT64, None, f"{STEP}|{name}") for name in StepRecord.array_names()
        }
    return found | dict(_extra(MODEL, content))


def dtypes_of(head: Mapping[str, np.ndarray]) -> dict[str, str]:
    """For the header: what each tensor of a task head is, as safetensors writes it."""
    return {name: HEAD_DTYPES[array.dtype.name] for name, array in sorted(head.items())}


def _of_matrix(prefix: str, scalars: Mapping[str, Any]) -> dict[str, DeclaredTensor]:
    found = {f"{prefix}|{name}": DeclaredTensor(FLOAT64, "k", f"{prefix}|{name}", required=False) for name in SPECTRA}
    found |= {
        f"{prefix}|{name}": DeclaredTensor(FLOAT32, "gnn", f"{prefix}|{name}", required=False) for name in FACTORS
    }
    for name in SKETCHES:
        if name in scalars:
            group = f"{prefix}|{name}"
            found[f"{group}|values"] = DeclaredTensor(FLOAT64, "k", group)
            found[f"{group}|vectors"] = DeclaredTensor(FLOAT32, "nk", group)
    return found | dict(_extra(prefix, scalars))


def _extra(prefix: str, scalars: Mapping[str, Any]) -> Iterator[tuple[str, DeclaredTensor]]:
    """Values that have no field, whose place in the header is None: float64 arrays by contract (``Statistic``)."""
    for name, value in (scalars.get("extra") or {}).items():
        if value is None:
            full = f"{prefix}|{name}"
            yield full, DeclaredTensor(FLOAT64, None, full, finite=must_be_finite(name))


def read_tensors(file: Any, content: Mapping[str, Any], *, finite: bool = True) -> dict[str, np.ndarray]:
    """The tensors of an open safetensors file by every name that the header gives them.

    Args:
        file: what ``safe_open`` with NumPy gives.
        content: the header; ``shared`` says which names stand for the tensor of another.
        finite: whether values are looked at, too.

    Raises:
        ActivationCacheError: names the tensor, what it is and what it must be.
    """
    stored, shared, declared = set(file.keys()), content["shared"], declared_tensors(content)
    for name in sorted(stored | set(shared)):
        if name not in declared:
            raise ActivationCacheError(f"tensor {name!r} belongs to no statistic of the header")
    for name, first in shared.items():
        if first not in stored or name in stored:
            raise ActivationCacheError(f"tensor {name!r} is declared equal to {first!r}, which is not in the file")
    lengths: dict[tuple[str, str], int] = {}
    read: dict[str, np.ndarray] = {}
    for name, one in declared.items():
        source = shared.get(name, name)
        if source not in stored:
            if one.required:
                raise ActivationCacheError(f"tensor {name!r} is not in the file")
            continue
        view = file.get_slice(source)
        _check_form(name, view.get_dtype(), view.get_shape(), one, lengths)
        if source not in read:
            read[source] = file.get_tensor(source)
        if finite and one.finite and not np.isfinite(read[source]).all():
            raise ActivationCacheError(f"tensor {name!r} has values that are not finite (NaN or infinity)")
        read[name] = read[source]
    return read


def _check_form(
    name: str, dtype: str, shape: list[int], one: DeclaredTensor, lengths: dict[tuple[str, str], int]
) -> None:
    if dtype != one.dtype:
        raise ActivationCacheError(f"tensor {name!r} has dtype {dtype} and must have {one.dtype}")
    if one.axes is None:
        return
    wrong = len(shape) != len(one.axes) or any(
        lengths.setdefault((one.group, letter), length) != length
        for letter, length in zip(one.axes, shape, strict=True)
    )
    if wrong:
        raise ActivationCacheError(
            f"tensor {name!r} has shape {shape} and must have [{', '.join(one.axes)}]"
            + ("" if one.axes == "k" else "; equal letters are equal lengths")
        )
