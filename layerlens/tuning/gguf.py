"""A LoRA adapter as GGUF, with llama.cpp's names and metadata, and a merged model by llama.cpp's own converter.

llama.cpp multiplies B·A by adapter.lora.alpha over the rank of the tensors, so what is written has one rank. The rows
of q and k of Llama and Mistral are in another order there: the two halves of each head's rotation alternate.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.models import Manifest
from layerlens.registry import ENGINES
from layerlens.tuning.merged import export_merged
from layerlens.tuning.served import Adapter
from layerlens.tuning.serving import origin_of, served_adapter
from layerlens.utils.atomic import staged_directory

if TYPE_CHECKING:
    import torch

ADAPTER_FILE, MODEL_FILE = "adapter.gguf", "model.gguf"
CONVERTER = "convert_hf_to_gguf.py"
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
    "gemma": ("gemma", False), "gemma2": ("gemma2", False), "gemma3_text": ("gemma3", False),
}  # fmt: skip
"""``model_type`` of transformers -> llama.cpp's name, and whether the rows of q and k are in another order."""


def export_gguf(
    place: Path, manifest: Manifest | None, model: str | None, output: Path, *, merged: bool, lora_part: bool = False
) -> dict[str, Path]:
    """Write adapter.gguf, or model.gguf of the merged model.

    Args:
        place, manifest, model, output: see ``export_served``.
        merged: write the whole model, which needs llama.cpp's ``convert_hf_to_gguf.py``.
        lora_part: leave adapters and prefixes out instead of refusing them.

    Raises:
        ManifestError: the gguf package or the converter is missing, or the architecture is not in ``ARCHITECTURES``.
    """
    if merged:
        return _merged_model(place, manifest, model, output)
    gguf = _gguf()
    with origin_of(place, manifest, model) as origin:
        adapter = served_adapter(ENGINES["llama.cpp"], origin, lora_part=lora_part)
        config = origin.skeleton("llama.cpp's tensor names depend on the base model").config
        known = ARCHITECTURES.get(config.model_type)
        if known is None:
            raise ManifestError(
                f"llama.cpp's tensor names are known for {', '.join(ARCHITECTURES)}, and the base model is "
                f"{config.model_type}: export with --serve llama.cpp and use llama.cpp's convert_lora_to_gguf.py"
            )
        with staged_directory(output, owned=(ADAPTER_FILE,)) as staging:
            write_adapter(gguf, staging / ADAPTER_FILE, adapter, config, *known)
    return {ADAPTER_FILE: output / ADAPTER_FILE}


def write_adapter(gguf: Any, path: Path, adapter: Adapter, config: Any, architecture: str, reorders: bool) -> None:
    """The file; ``adapter`` has one rank, ``config`` is of transformers.

    Raises:
        ManifestError: a layer has no name in llama.cpp.
    """
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.config["lora_alpha"]))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for layer, a in sorted(adapter.a.items()):
        name, b = names.get_name(layer), adapter.b[layer]
        if name is None:
            raise ManifestError(f"{layer}: has no name in llama.cpp's {architecture}")
        if reorders and (count := heads.get(layer.rpartition(".")[2])):
            b = reordered(b, count)
        writer.add_tensor(f"{name}.weight.lora_a", a.float().contiguous().numpy())
        writer.add_tensor(f"{name}.weight.lora_b", b.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reordered(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k [heads · 2 · half, n] in llama.cpp's order: the halves of each head alternate."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ManifestError(
            "GGUF export needs the gguf package, which is not installed; run: pip install gguf"
        ) from error
    return gguf


def _merged_model(place: Path, manifest: Manifest | None, model: str | None, output: Path) -> dict[str, Path]:
    converter = find_converter()
    if converter is None:
        raise ManifestError(
            f"llama.cpp's {CONVERTER} is not on PATH, nor in the folder that LLAMA_CPP names: write the merged "
            f"checkpoint with --merge alone, and run `python {CONVERTER} DIRECTORY` where llama.cpp is"
        )
    with tempfile.TemporaryDirectory(prefix="layerlens-") as work:
        export_merged(place, manifest, model, Path(work) / "merged")
        with staged_directory(output, owned=(MODEL_FILE,)) as staging:
            command = [
                sys.executable,
                str(converter),
                str(Path(work) / "merged"),
                "--outfile",
                str(staging / MODEL_FILE),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not (staging / MODEL_FILE).is_file():
                last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
                raise ManifestError(f"{converter} failed: {last}")
    return {MODEL_FILE: output / MODEL_FILE}


def find_converter() -> Path | None:
    """llama.cpp's converter, on PATH or in the folder that the environment variable LLAMA_CPP names."""
    if folder := os.environ.get("LLAMA_CPP"):
        found = Path(folder).expanduser() / CONVERTER
        return found if found.is_file() else None
    on_path = shutil.which(CONVERTER)
    return Path(on_path) if on_path else None
