"""How large the weights of a quantized model are by its configuration, or by the files of its checkpoint.

Nothing is loaded. Files say it to the byte. Without them it follows from the bits of a weight, and from how many
weights share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelNotFoundError, ModelSpecError
from layerlens.integrations.quantized_loading import method_of
from layerlens.integrations.safetensors_files import TensorPlace, checkpoint_tensors
from layerlens.integrations.skeleton import renamed
from layerlens.integrations.transformers import dense_shape, is_dense

if TYPE_CHECKING:
    import torch

FLOAT32, FLOAT16 = 4.0, 2.0
TABLE = 16 * FLOAT32
"""bitsandbytes' values of 4 bits, which every layer has."""
TABLE_OF_SCALES = 256 * FLOAT32
SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules", "ignore")
UNPACKED_EVERYWHERE = ("compressed-tensors",)
UNPACKED_ON_A_CPU = ("fp8", "fbgemm_fp8", "mxfp4")


@dataclass(frozen=True)
class Storage:
    """How a layer's weight is stored.

    Args:
        bits: of a weight.
        group: weights of a row, or of all rows one after the other, that share a scale; 0 for a whole row.
        of_group: bytes of the scale and zero point of a group.
        per_input: bytes for each input feature.
        per_layer: bytes of tables.
        block: [rows, columns] that share a scale; then ``group`` is not read.
        flat: whether groups continue from one row into the next.
    """

    bits: float
    group: int = 0
    of_group: float = FLOAT16
    per_input: float = 0.0
    per_layer: float = 0.0
    block: tuple[int, int] | None = None
    flat: bool = False

    def bytes_of(self, n_in: int, n_out: int) -> float:
        """Bytes of the weight of a layer."""
        if self.block is not None:
            groups = math.ceil(n_out / self.block[0]) * math.ceil(n_in / self.block[1])
        elif self.flat:
            groups = math.ceil(n_in * n_out / self.group)
        else:
            groups = n_out * (math.ceil(n_in / self.group) if self.group > 0 else 1)
        return self.bits / 8 * n_in * n_out + groups * self.of_group + n_in * self.per_input + self.per_layer


@dataclass(frozen=True)
class Sizes:
    """What the weights of a quantized model come to.

    Args:
        bytes: of all of them, scales and tables too; None where the format is not known.
        said: how they are known, a sentence.
    """

    bytes: int | None
    said: str


def quantized_sizes(
    model: torch.nn.Module, quantization: Mapping[str, Any], dense_bytes: int, *, files: Path | None = None,
    spared: Sequence[str] = (), on_cpu: bool = True,
) -> Sizes:  # fmt: skip
    """The size of a model's weights when they are quantized.

    Args:
        model: without its weights, in the dtype that those have which are not quantized.
        quantization: as transformers' configurations have it.
        dense_bytes: of the weights were they not quantized.
        files: the directory of the checkpoint, where it is the checkpoint that is quantized.
        spared: modules that are new and not quantized: a task head.
        on_cpu: whether the model is for a CPU, on which some formats are unpacked.
    """
    method = method_of(quantization)
    if method in UNPACKED_EVERYWHERE or (on_cpu and method in UNPACKED_ON_A_CPU):
        where = "as they load" if method in UNPACKED_EVERYWHERE else "as they load on a CPU"
        return Sizes(dense_bytes, f"Weights in {method} are unpacked {where}, and are counted so.")
    if files is not None and (found := _in_files(model, files, spared)) is not None:
        return Sizes(found, f"Quantized weights ({method}) are counted as they lie in the files.")
    storage = storage_of(quantization)
    if storage is None:
        return Sizes(None, f"The size of weights in {method} is not known from a configuration alone.")
    size = next((x.element_size() for x in model.parameters() if x.is_floating_point()), 4)
    packed, dense = 0.0, 0
    for path in quantized_paths(model, quantization, spared):
        n_in, n_out = dense_shape(model.get_submodule(path))
        packed += storage.bytes_of(n_in, n_out)
        dense += size * n_in * n_out
    said = f"Quantized weights ({method}, {storage.bits:g} bits) are counted with their scales."
    return Sizes(dense_bytes - dense + math.ceil(packed), said)


def storage_of(quantization: Mapping[str, Any]) -> Storage | None:
    """How a format stores a weight; None where its configuration does not say it in a way that is known here."""
    method, said = method_of(quantization), dict(quantization)
    if method.startswith("bitsandbytes"):
        if said.get("load_in_8bit"):
            return Storage(8, of_group=FLOAT32)
        if said.get("bnb_4bit_use_double_quant"):  # a byte for each scale, and for 256 of them a scale
            return Storage(4, 64, 1 + FLOAT32 / 256, per_layer=TABLE + TABLE_OF_SCALES + FLOAT32, flat=True)
        return Storage(4, 64, FLOAT32, per_layer=TABLE, flat=True)
    bits = said.get("bits") or said.get("nbits") or said.get("w_bit")
    group = int(said.get("group_size") or said.get("q_group_size") or 0)
    if method in ("gptq", "awq") and bits:
        places = 4.0 if method == "gptq" else 0.0  # GPTQ notes the group of each input
        return Storage(bits, max(0, group), FLOAT16 + bits / 8, per_input=places)
    if method == "hqq" and bits:
        return Storage(bits, group, 2 * FLOAT16, flat=True)
    if method == "fp8":
        rows, columns = said.get("weight_block_size") or (128, 128)
        return Storage(8, of_group=FLOAT32, block=(int(rows), int(columns)))
    if method == "eetq":
        return Storage(8)
    if method == "quanto":
        return {"int8": Storage(8, of_group=FLOAT32), "float8": Storage(8, of_group=FLOAT32),
                "int4": Storage(4, 128, 2 * FLOAT32, flat=True), "int2": Storage(2, 128, 2 * FLOAT32, flat=True),
                }.get(str(said.get("weights")))  # fmt: skip
    if method == "torchao":
        kind = str(said.get("quant_type")).lower()
        return next((Storage(8, of_group=FLOAT32) for name in ("int8", "float8") if name in kind), None)
    return None


def quantized_paths(model: torch.nn.Module, quantization: Mapping[str, Any], spared: Sequence[str] = ()) -> list[str]:
    """The layers that transformers quantizes: Linear ones but the output layer, and what the configuration names."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    named = [pattern for key in SKIPPED for pattern in quantization.get(key) or ()]
    kept = [*(named or get_keys_to_not_convert(model)), *spared]
    return [path for path, module in model.named_modules() if is_dense(module) and should_convert_module(path, kept)]


def _in_files(model: torch.nn.Module, directory: Path, new: Sequence[str]) -> int | None:
    """Bytes of the model's weights by the files of its checkpoint, ``new`` modules added; None where there are none."""
    import torch

    try:
        places = checkpoint_tensors(directory)
    except ModelNotFoundError:  # no files, or others than safetensors
        return None
    groups: dict[str, dict[str, TensorPlace]] = {}
    for name, place in places.items():
        path = name.partition(".weight")[0] if ".weight" in name else name.rpartition(".")[0]
        groups.setdefault(path, {})[name] = place
    packed = 0
    plain: dict[str, TensorPlace] = {}
    for found in groups.values():
        dtypes = [getattr(torch, place.dtype) for place in found.values()]
        if all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes):
            plain |= found
        else:
            packed += sum(place.numel * dtype.itemsize for place, dtype in zip(found.values(), dtypes, strict=True))
    size = next((x.element_size() for x in model.parameters() if x.is_floating_point()), 4)
    with suppress(ModelSpecError, ModelNotFoundError):  # names that transformers does not know as they are: all count
        plain = renamed(model, plain)
    heads = sum(x.numel() for path in new for x in model.get_submodule(path).parameters())
    plain = {name: place for name, place in plain.items() if not name.startswith(tuple(f"{path}." for path in new))}
    return packed + size * (sum(place.numel for place in plain.values()) + heads) if packed else None
