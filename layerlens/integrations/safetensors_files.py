"""Where the tensors of a safetensors checkpoint lie in its files, and reading them by plain reads, one at a time.

``safetensors.safe_open`` maps whole files: a checkpoint larger than the address space that a process may use cannot be
opened that way, and mapped pages count as the process's own. Here the header of every file is read once (8 bytes of
length, then JSON: the safetensors format), and after that ``pread`` fills memory that the caller owns.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelNotFoundError

if TYPE_CHECKING:
    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
"""As in the reference implementation: a longer header is taken for damage."""
CHUNK_BYTES = 2**24
"""Read at once where the checkpoint's precision is not the one that is wanted."""


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a checkpoint.

    Args:
        file: where it is.
        offset: its first byte in the file.
        dtype: name of its torch dtype.
        shape: its shape.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def checkpoint_tensors(directory: Path) -> dict[str, TensorPlace]:
    """Every tensor of the (sharded) model.safetensors in ``directory``, by its name there.

    Raises:
        ModelNotFoundError: there is no such checkpoint, or a file is missing, cut short or no safetensors file, or a
            shard lacks a tensor that the index promises; names the file.
    """
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise ModelNotFoundError(
                f"model.name_or_path: {directory} has neither {SINGLE} nor {INDEX}, and only safetensors can be "
                "streamed; save the model again with save_pretrained, or set profiling.memory_mode: plain"
            )
        return read_header(directory / SINGLE)
    try:
        weight_map = _weight_map(index)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"model.name_or_path: {index} is not an index of shards ({error}); save it again"
        ) from error
    shards = sorted(set(weight_map.values()))
    headers = {shard: read_header(directory / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ModelNotFoundError(
                f"model.name_or_path: {INDEX} says that {name} is in {shard}, which lacks it; the checkpoint is "
                "incomplete: copy it again"
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """tensor -> file, as an index of shards has it.

    Raises:
        OSError, ValueError: it cannot be read, or is none.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, TypeError) as error:
        raise ValueError("it has no weight_map") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(found, dict) or not all(isinstance(one, str) and one for one in found.values()):
        raise ValueError("its weight_map is not a table of file names")
    return found


def read_header(file: Path) -> dict[str, TensorPlace]:
    """The tensors of one safetensors file.

    Raises:
        ModelNotFoundError: the file is missing, cut short, or not a safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(file, f"its header claims {length} bytes of the file's {size}")
            header = json.loads(stream.read(length))
        places = {name: _place(file, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"model.name_or_path: no shard at {file}; the checkpoint is incomplete") from error
    except OSError as error:
        raise ModelNotFoundError(f"model.name_or_path: cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise _damaged(file, f"its header is not a table of tensors ({error})") from error
    for name, place in places.items():
        if place.offset + place.numel * _width(place.dtype) > size:
            raise _damaged(file, f"{name} would end behind its end")
    return places


def read_tensor(place: TensorPlace, out: torch.Tensor) -> None:
    """Fill ``out``, contiguous and in main memory, with the tensor, converted to its dtype.

    Raises:
        ModelNotFoundError: the file ends before the tensor does.
    """
    if str(out.dtype) == f"torch.{place.dtype}":
        with place.file.open("rb", buffering=0) as stream:
            _fill(stream.fileno(), place, place.offset, memoryview(_as_bytes(out)))
        return
    flat, first = out.view(-1), 0
    for piece in pieces(place):
        flat[first : first + piece.numel()] = piece
        first += piece.numel()


def pieces(place: TensorPlace) -> Iterator[torch.Tensor]:
    """The tensor's elements in their own dtype, in order, some megabytes at a time; the same memory each time."""
    import torch

    dtype: torch.dtype = getattr(torch, place.dtype)
    step = CHUNK_BYTES // _width(place.dtype)
    buffer = torch.empty(min(step, place.numel), dtype=dtype)
    with place.file.open("rb", buffering=0) as stream:
        for first in range(0, place.numel, step):
            piece = buffer[: min(step, place.numel - first)]
            offset = place.offset + first * _width(place.dtype)
            _fill(stream.fileno(), place, offset, memoryview(_as_bytes(piece)))
            yield piece


def load_weights(model: torch.nn.Module, place: str, base_dir: Path | None, optional: tuple[str, ...] = ()) -> set[str]:
    """Fill ``model`` in place with what a .safetensors file, or a directory with (sharded) model.safetensors, has.

    Args:
        model: the model.
        place: the file or directory, below ``base_dir`` if it is relative.
        base_dir: folder of the configuration file.
        optional: parameters (of a task head) that the file may lack, or have in another shape.

    Returns:
        Those of ``optional`` that were not filled.

    Raises:
        ModelNotFoundError: no such file, or tensors of another model; names the first that is missing or does not fit.
    """
    import torch

    found = _load_files(((base_dir or Path()) / Path(place).expanduser()).resolve(), place)
    found = {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}  # of a compiled model
    own = model.state_dict()
    lacking = {name for name in own if name not in found or found[name].shape != own[name].shape}
    wrong = sorted(lacking - set(optional)) + sorted(found.keys() - own.keys())
    if wrong:
        name = wrong[0]
        if name not in own:
            reason = f"has {name}, which {type(model).__name__} has not"
        elif name not in found:
            reason = f"lacks {name}"
        else:
            reason = f"has {name} as {list(found[name].shape)}, the model as {list(own[name].shape)}"
        raise ModelNotFoundError(f"model.weights: {place} {reason} ({len(wrong)} tensors do not fit)")
    with torch.no_grad():
        model.load_state_dict({name: tensor for name, tensor in found.items() if name not in lacking}, strict=False)
    return lacking


def _load_files(path: Path, place: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [path]
    if path.is_dir():
        files = [path / SINGLE]
        if (path / INDEX).is_file():
            try:
                files = [path / name for name in sorted(set(_weight_map(path / INDEX).values()))]
            except (OSError, ValueError) as error:
                raise ModelNotFoundError(
                    f"model.weights: {path / INDEX} is not an index of shards ({error})"
                ) from error
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except FileNotFoundError as error:
            raise ModelNotFoundError(
                f"model.weights: no file at {file}; give a .safetensors file, or a directory with {SINGLE}"
            ) from error
        except (SafetensorError, OSError, ValueError) as error:  # ValueError: no file can have such a name
            raise ModelNotFoundError(f"model.weights: {place} is not a readable safetensors file: {error}") from error
    return tensors


def _place(file: Path, start: int, entry: dict[str, Any]) -> TensorPlace:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']}, known are {', '.join(DTYPES)}")
    first, end = entry["data_offsets"]
    place = TensorPlace(file, start + int(first), DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
    if int(first) < 0 or any(size < 0 for size in place.shape):
        raise ValueError(f"a shape of {list(place.shape)} at {first}")
    if int(end) - int(first) != place.numel * _width(place.dtype):
        raise ValueError(f"{end} - {first} bytes for a shape of {list(place.shape)}")
    return place


def _width(dtype: str) -> int:
    return {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}.get(dtype, 1)


def _as_bytes(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.view(-1).view(torch.uint8).numpy()


def _fill(descriptor: int, place: TensorPlace, offset: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            raise _damaged(place.file, "it became shorter while it was read")
        done += count


def _damaged(file: Path, what: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"model.name_or_path: {file} is damaged: {what}; copy the checkpoint again")
