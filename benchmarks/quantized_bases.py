"""Every format of quantized weights that installs on a CPU through a whole job: the table in docs/quantized-bases.md.

    python -m benchmarks.quantized_bases              try all that are installed, write the results and the page
    python -m benchmarks.quantized_bases awq gptq     try these, keep the results of the others
    python -m benchmarks.quantized_bases --page       write the page from the results

Each is a tiny Llama with random weights, written as a checkpoint of that format by the library that has the format, or,
where that quantizes on a GPU alone, packed by the library's own layers. The cells are those of ``architectures``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import CELLS, ROOT, UNEXPECTED, _quiet, cells_of
from benchmarks.tiny_models import WORDS, Architecture, tokenizer

RESULTS = ROOT / "benchmarks" / "results" / "quantized_bases.json"
PAGE = ROOT / "docs" / "quantized-bases.md"
GROUP = 32
LLAMA = Architecture("llama", "causal-lm")
BLOCK = 128
"""Rows and columns of a weight that share a scale, in fine-grained FP8."""


def dense(**fields: Any) -> Any:
    """A Llama with widths that every format takes."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "pad_token_id": 4,
        "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1,
    }  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes | fields)).eval()


def by_transformers(make: Callable[[], Any], dtype: torch.dtype = torch.bfloat16) -> Callable[[Path], None]:
    """A writer of a checkpoint that transformers quantizes as it loads."""

    def write(directory: Path) -> None:
        import transformers as hf

        dense().save_pretrained(directory / "dense")
        model = hf.AutoModelForCausalLM.from_pretrained(directory / "dense", quantization_config=make(), dtype=dtype)
        model.save_pretrained(directory / "model")

    return write


def bitsandbytes(**asked: Any) -> Any:
    import transformers as hf

    return hf.BitsAndBytesConfig(**asked)


def torchao(name: str, **asked: Any) -> Any:
    import torchao.quantization as quantization
    import transformers as hf

    return hf.TorchAoConfig(getattr(quantization, name)(**asked))


def write_dense(directory: Path) -> None:
    """For formats that transformers does not save."""
    dense().save_pretrained(directory / "model")


def write_gptq(directory: Path) -> None:
    """By GPTQ itself, over some lines of words."""
    import random

    from gptqmodel import GPTQModel, QuantizeConfig

    dense().save_pretrained(directory / "dense")
    tokenizer().save_pretrained(directory / "dense")
    model = GPTQModel.load(str(directory / "dense"), QuantizeConfig(bits=4, group_size=GROUP, device="cpu"))
    drawn = random.Random(0)
    model.quantize([" ".join(drawn.choices(WORDS, k=64)) for _ in range(32)], batch_size=4)
    model.save(str(directory / "model"))


def write_awq(directory: Path) -> None:
    """Rounded to the nearest of 16 values in each group: AWQ's own search needs a GPU. Packed by gptqmodel."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    def packed(layer: torch.nn.Linear) -> dict[str, torch.Tensor]:
        groups = layer.weight.data.unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low) / 15).clamp(min=1e-5)
        zeros = (-low / scales).round().clamp(0, 15)
        new = AwqTorchLinear(4, GROUP, False, False, layer.in_features, layer.out_features, register_buffers=True)
        new.pack(layer, scales, zeros)
        return {name: getattr(new, name) for name in ("qweight", "qzeros", "scales")}

    said = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    _write(directory / "model", packed, said | {"modules_to_not_convert": ["lm_head"]})


def write_fp8(directory: Path) -> None:
    """Fine-grained FP8, as DeepSeek and Qwen publish it: a scale for each block of 128 × 128."""

    def packed(layer: torch.nn.Linear) -> dict[str, torch.Tensor]:
        blocks = layer.weight.data.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scale = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        weight = (blocks / scale[:, None, :, None]).reshape(layer.weight.shape).to(torch.float8_e4m3fn)
        return {"weight": weight, "weight_scale_inv": scale}

    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    _write(directory / "model", packed, said | {"modules_to_not_convert": ["lm_head"]})


def compressed(form: str) -> Callable[[Path], None]:
    """A writer of vLLM's compressed-tensors, by that library."""

    def write(directory: Path) -> None:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        from compressed_tensors.quantization.utils import calculate_qparams

        model = dense()
        config = QuantizationConfig(config_groups={form: ["Linear"]}, ignore=["lm_head"], quantization_status="frozen")
        apply_quantization_config(model, config)
        for layer in model.modules():
            scheme = getattr(layer, "quantization_scheme", None)
            if scheme is None:
                continue
            weight, args = layer.weight.data, scheme.weights
            rows = weight.unflatten(1, (-1, args.group_size)) if args.group_size else weight
            low, high = rows.amin(-1), rows.amax(-1)
            if layer.weight_scale.dim() > low.dim():
                low, high = low[:, None], high[:, None]
            if layer.weight_scale.numel() == 1:
                low, high = weight.amin().reshape(1), weight.amax().reshape(1)
            scale_of_all = getattr(layer, "weight_global_scale", None)
            if scale_of_all is not None:  # NVFP4: as large as the scales of groups can be
                scale_of_all.data = (448.0 * 6.0 / weight.abs().amax()).reshape(1)
            layer.weight_scale.data, _ = calculate_qparams(low, high, args, scale_of_all)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(directory / "model")
        compressor.update_config(str(directory / "model"))

    return write


def _write(directory: Path, packed: Callable[[torch.nn.Linear], dict[str, torch.Tensor]], said: dict[str, Any]) -> None:
    """A checkpoint with the layers of all blocks packed, and what its configuration says of that."""
    from safetensors.torch import save_file

    model = dense().to(torch.float16)
    state = dict(model.state_dict())
    for name, layer in model.model.layers.named_modules():
        if isinstance(layer, torch.nn.Linear):
            path = f"model.layers.{name}"
            del state[f"{path}.weight"]
            state |= {f"{path}.{key}": x.contiguous() for key, x in packed(layer.float()).items()}
    directory.mkdir(parents=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": said}
    (directory / "config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Format:
    """A format of quantized weights: which package has it, how a checkpoint of it is written, and its dtype.

    With ``asked`` the checkpoint is dense, and is quantized as it is loaded.
    """

    package: str
    write: Callable[[Path], None]
    dtype: str = "float32"
    asked: Mapping[str, Any] | None = None


def _bits(**asked: Any) -> Callable[[Path], None]:
    return by_transformers(lambda: bitsandbytes(**asked))


def _torchao(name: str) -> Callable[[Path], None]:
    return by_transformers(lambda: torchao(name))


FORMATS = {
    "bitsandbytes nf4": Format("bitsandbytes", _bits(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bitsandbytes int8": Format("bitsandbytes", _bits(load_in_8bit=True)),
    "GPTQ 4 bits": Format("gptqmodel", write_gptq),
    "AWQ 4 bits": Format("gptqmodel", write_awq),
    "torchao int8": Format("torchao", _torchao("Int8WeightOnlyConfig")),
    "torchao int8 and activations": Format("torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao float8": Format("torchao", _torchao("Float8WeightOnlyConfig"), "bfloat16"),
    "FP8 by blocks": Format("accelerate", write_fp8),
    "compressed-tensors W4A16": Format("compressed-tensors", compressed("W4A16")),
    "compressed-tensors W8A8": Format("compressed-tensors", compressed("W8A8")),
    "compressed-tensors FP8_DYNAMIC": Format("compressed-tensors", compressed("FP8_DYNAMIC")),
    "compressed-tensors NVFP4A16": Format("compressed-tensors", compressed("NVFP4A16"), "bfloat16"),
    "optimum-quanto int8": Format("optimum-quanto", write_dense, asked={"quant_method": "quanto", "weights": "int8"}),
    "optimum-quanto int4": Format("optimum-quanto", write_dense, asked={"quant_method": "quanto", "weights": "int4"}),
}


def tried(name: str) -> dict[str, Any]:
    """What every cell says of one format."""
    one = FORMATS[name]
    with tempfile.TemporaryDirectory() as place, _quiet():
        directory = Path(place)
        try:
            one.write(directory)
        except Exception as error:
            return {"package": one.package, "not written": f"{type(error).__name__}: {error}"[:300]}
        tokenizer().save_pretrained(directory / "model")
        return {"package": f"{one.package} {version(one.package)}", **cells_of(LLAMA, directory, one.dtype, one.asked)}


NOT_HERE = {
    "HQQ": "transformers 5.24 does not load it. A model in memory whose layers are HQQLinear went through "
    "`layerlens.plan` and stock PEFT with no change at step 0 (hqq 0.2.8)",
    "EETQ, HIGGS, FP-Quant, VPTQ, SpQR, Quark, SINQ": "quantize and multiply on a GPU alone",
    "AQLM": "no package on a CPU writes a checkpoint; PEFT has a layer for it",
    "MXFP4 (GPT-OSS as published)": "needs triton and `kernels`; without them transformers unpacks the "
    "experts, which is said",
    "BitNet": "PEFT has no layer for it: every layer is left out with what PEFT says, and the run ends with that",
}
"""Formats that were read about and not run, with what is known of them."""


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/quantized-bases.md."""
    lines = [
        "# Quantized bases", "",
        "<!-- Made by python -m benchmarks.quantized_bases; change it there. -->", "",
        "The table shows a whole job on a tiny Llama with random weights, in each format that installs on a "
        "CPU. The columns are those of [architectures](architectures.md). Stock PEFT loads the base like the "
        "snippet of `layerlens export`.",
        "", "| format | package | dtype | " + " | ".join(CELLS) + " | warnings and layers left out |",
        "|---|---|---|" + "---|" * (len(CELLS) + 1),
    ]  # fmt: skip
    for name, one in FORMATS.items():
        row = results.get(name, {"not written": "not tried", "package": one.package})
        reasons = [f"{len(layers)} left out: {reason}" for reason, layers in row.get("left_out", {}).items()]
        said = "; ".join([*(note.removeprefix("model: ") for note in row.get("notes", ())), *reasons])
        cells = [str(row.get(cell, row.get("not written", ""))) for cell in CELLS]
        told = [name, row["package"], one.dtype, *cells, said]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in told) + " |")
    lines += [
        "", "LayerLens loads GPTQ and AWQ with gptqmodel's kernel for training (`backend: auto_trainable`). "
        "gptqmodel's CPU kernel repacks the weights in the first call without a gradient, and gives no "
        "gradient from then on. LayerLens prevents this in its own jobs. In your own script, call "
        "`model.train()` before the first call.",
        "", "Not tested:", "",
    ]  # fmt: skip
    lines += [f"- {name}: {reason}." for name, reason in NOT_HERE.items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Try, write, and say what was unexpected."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    names = [name for name in arguments if not name.startswith("--")]
    if "--page" not in arguments:
        for key in FORMATS:
            if not names or any(name in key for name in names):
                results[key] = tried(key)
                print(f"{key}: {[results[key].get(cell) for cell in CELLS]}", flush=True)
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(results))
    wrong = [
        key for key, row in results.items() if any(str(row.get(x, UNEXPECTED)).startswith(UNEXPECTED) for x in CELLS)
    ]
    print("\n".join(wrong) or f"{len(results)} formats, nothing unexpected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
