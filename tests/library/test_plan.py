"""``layerlens.plan`` chooses what ``layerlens run`` does, and what it gives goes straight into stock PEFT."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import layerlens
from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.pipeline import run_config

HEAD_FIT = 1e-3
"""Two fits of a new head begin from other random numbers and stop within 1e-6 of the gradient (relative utilities)."""


def assert_same_choice(plan: layerlens.Plan, settings: dict[str, Any], folder: Path, rel: float = 0.0) -> None:
    """A run of the same settings has the same bytes of the choice, and utilities that differ by ``rel``."""
    result = run_config(RunConfig.model_validate(settings), base_dir=folder, use_cache=False)
    ours, theirs = plan.choice, result.manifest.choice
    assert ours.rows()
    assert json.dumps(ours.rows()) == json.dumps(theirs.rows())
    for own, other in zip(plan.manifest.allocations, result.manifest.allocations, strict=True):
        assert own.utility == pytest.approx(other.utility, rel=rel, abs=0.0)
        assert (own.cost, own.flops, own.vram, own.latency) == (other.cost, other.flops, other.vram, other.latency)
    plan.save(folder / "saved")
    one, other = (load_file(folder / place / "peft" / "adapter_model.safetensors") for place in ("out", "saved"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if ".lora_" in name:
            assert torch.equal(tensor, other[name])
        else:  # a new head, fitted twice
            assert torch.allclose(tensor, other[name], rtol=0.0, atol=HEAD_FIT)


def test_rows_of_a_classifier_with_a_new_head(tiny_bert_dir: Path, reviews_jsonl: Path, tmp_path: Path):
    rows = [json.loads(line) for line in reviews_jsonl.read_text(encoding="utf-8").splitlines()]
    labels = sorted({str(row["label"]) for row in rows})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=len(labels))
    plan = layerlens.plan(
        model, rows, tokenizer=AutoTokenizer.from_pretrained(tiny_bert_dir), max_trainable_params=1500, max_length=16,
        calibration_samples=24, batch_size=8, head_fit_samples=32, threads=1,
    )  # fmt: skip
    assert any("new head: classifier: the checkpoint" in note for note in plan.notes)
    settings = {
        "model": {"name_or_path": str(tiny_bert_dir), "head_fit_samples": 32},
        "data": {"source": str(reviews_jsonl), "calibration_samples": 24, "max_length": 16, "batch_size": 8},
        "optimization": {"max_trainable_params": 1500, "methods": ["lora"], "latency_profile": {"sequence_length": 64}},
        "runtime": {"threads": 1},
    }
    assert_same_choice(plan, settings, tmp_path, HEAD_FIT)


def test_rows_of_a_causal_language_model(llama: torch.nn.Module, minilm_path: str, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    llama.resize_token_embeddings(len(tokenizer))
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    rows = [{"text": f"text number {n} says {n * n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    plan = layerlens.plan(
        model, rows, tokenizer=tokenizer, max_trainable_params=2000, calibration_samples=16, max_length=16, threads=1
    )
    settings = {
        "model": {"name_or_path": str(tmp_path / "llama"), "task": "causal-lm"},
        "data": {"source": "rows.jsonl", "calibration_samples": 16, "max_length": 16},
        "optimization": {"max_trainable_params": 2000, "methods": ["lora"], "latency_profile": {"sequence_length": 64}},
        "runtime": {"threads": 1},
    }
    assert_same_choice(plan, settings, tmp_path)


def test_images_of_a_vit(tmp_path: Path):
    import numpy as np
    from PIL import Image
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
                       patch_size=8, num_labels=2)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "vit")
    rows = []
    for n in range(24):
        path = tmp_path / f"{n}.png"
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
        rows.append({"image": str(path), "label": ("cat", "dog")[n % 2]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit", id2label={0: "cat", 1: "dog"})
    plan = layerlens.plan(model, rows, tokenizer=processor, max_trainable_params=600, calibration_samples=16, threads=1)
    settings = {
        "model": {"name_or_path": str(tmp_path / "vit"), "task": "image-classification"},
        "data": {"source": "rows.jsonl", "calibration_samples": 16},
        "optimization": {"max_trainable_params": 600, "methods": ["lora"]},
        "runtime": {"threads": 1},
    }
    assert_same_choice(plan, settings, tmp_path)


def test_a_model_by_name_is_a_run_without_files(tiny_bert_dir: Path, reviews_jsonl: Path, tmp_path: Path):
    settings = {"max_trainable_params": 1500, "max_length": 16, "calibration_samples": 24, "head_fit_samples": 32,
                "latency_profile": {"sequence_length": 16}}  # fmt: skip
    plan = layerlens.plan(str(tiny_bert_dir), str(reviews_jsonl), task="sequence-classification", threads=1, **settings)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=2)
    assert plan.lora_config(model).r == max(plan.ranks.values())
    with pytest.raises(ManifestError, match="pass it as model="):
        plan.lora_config()


@pytest.mark.parametrize("fresh", [False, True], ids=["trained head", "new head"])
def test_what_was_trained_comes_back_in_stock_peft(
    bert: torch.nn.Module, bert_batches: list[Any], warm_python: Any, tmp_path: Path, fresh: bool
):
    """Logits are the same, the head included."""
    bert.save_pretrained(tmp_path / "base")
    plan = layerlens.plan(bert, bert_batches, new_head=fresh, max_trainable_params=800)
    tuned = get_peft_model(bert, plan.lora_config())
    optimizer = torch.optim.AdamW([x for x in tuned.parameters() if x.requires_grad], lr=1e-2)
    for batch in bert_batches:
        tuned(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.eval()
    with torch.no_grad():
        logits = tuned(**bert_batches[0]).logits
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        assert torch.equal(again(**bert_batches[0]).logits, logits)
    if fresh:
        done = warm_python.run("-c", in_another_process(bert_batches[0], logits, tmp_path))
        assert done.returncode == 0, done.stderr


def in_another_process(batch: dict[str, torch.Tensor], logits: torch.Tensor, folder: Path) -> str:
    """The same in a process in which LayerLens cannot be imported."""
    torch.save((batch, logits), folder / "logits.pt")
    return f"""
import sys, torch
assert 'layerlens' not in sys.modules
sys.modules['layerlens'] = None
from transformers import AutoModelForSequenceClassification
from peft import PeftModel
torch.set_num_threads(1)
model = AutoModelForSequenceClassification.from_pretrained({str(folder / "base")!r})
batch, logits = torch.load({str(folder / "logits.pt")!r})
tuned = PeftModel.from_pretrained(model, {str(folder / "adapter")!r}).eval()
with torch.no_grad():
    assert torch.equal(tuned(**batch).logits, logits)
"""


def test_a_user_may_load_an_adapter_right_after_planning(
    bert: torch.nn.Module, bert_batches: list[Any], tmp_path: Path
):
    plan = layerlens.plan(bert, bert_batches, max_trainable_params=800)
    files = plan.save(tmp_path / "out")
    tuned = PeftModel.from_pretrained(bert, files["peft"])
    assert sum(x.numel() for name, x in tuned.named_parameters() if "lora_" in name) == plan.trainable_params


def test_applied_trained_and_taken_out(bert: torch.nn.Module, bert_batches: list[Any]):
    from layerlens.tuning import unapply

    plan = layerlens.plan(bert, bert_batches, max_trainable_params=800, methods=["lora", "adapter"])
    before = {name: x.detach().clone() for name, x in bert.named_parameters()}
    bert.eval()
    with torch.no_grad():
        logits = bert(**bert_batches[0]).logits
        tuned = plan.apply().eval()
        assert torch.equal(tuned(**bert_batches[0]).logits, logits)
    back = unapply(tuned)
    assert dict.fromkeys(before, True) == {name: torch.equal(x, before[name]) for name, x in back.named_parameters()}


def test_a_config_of_a_mixed_choice_says_what_share_it_holds(bert: torch.nn.Module, bert_batches: list[Any]):
    plan = layerlens.plan(
        bert, bert_batches, max_trainable_params=3000, methods=["lora", "adapter"], adapter_sizes=[2],
        constraints={"min_layers": {"lora": 1, "adapter": 1}},
    )  # fmt: skip
    of_lora = sum(row.cost for row in plan.manifest.allocations if row.method == "lora")
    assert 0.0 < plan.lora_share == of_lora / plan.trainable_params < 1.0
    with pytest.warns(UserWarning, match=f"holds {plan.lora_share:.0%} of the chosen parameters.*adapter"):
        config = plan.lora_config()
    assert config.r == plan.lora_config(method="lora").r


def test_parts_are_the_whole(bert: torch.nn.Module, bert_batches: list[Any]):
    statistics = layerlens.profile(bert, bert_batches)
    for budget in (400, 1500):
        chosen = layerlens.choose(statistics, max_trainable_params=budget, model=bert)
        planned = layerlens.plan(bert, bert_batches, max_trainable_params=budget)
        assert chosen.choice.rows() == planned.choice.rows()
        assert chosen.lora_config().to_dict() == planned.lora_config().to_dict()


def test_a_saved_plan_is_loaded(bert: torch.nn.Module, bert_batches: list[Any], tmp_path: Path):
    plan = layerlens.plan(bert, bert_batches, max_trainable_params=800)
    plan.save(tmp_path / "out")
    again = layerlens.load(tmp_path / "out")
    assert again.manifest == plan.manifest
    assert again.solution.allocation.value == plan.solution.allocation.value
    assert again.lora_config(bert).to_dict() == plan.lora_config().to_dict()
    smaller = layerlens.choose(tmp_path / "out", max_trainable_params=300)
    assert 0 < smaller.trainable_params <= 300


def test_a_plan_does_not_keep_the_model(bert_batches: list[Any]):
    import gc
    import weakref

    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
        )
    )
    plan = layerlens.plan(model, bert_batches, max_trainable_params=500)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(ManifestError, match="is gone"):
        plan.lora_config()


def test_pickling_is_refused_with_the_way_to_go(bert: torch.nn.Module, bert_batches: list[Any]):
    plan = layerlens.plan(bert, bert_batches, max_trainable_params=500)
    with pytest.raises(TypeError, match=r"plan\.save"):
        pickle.dumps(plan)


def test_settings_that_are_not_there_are_named(bert: torch.nn.Module, bert_batches: list[Any]):
    with pytest.raises(ConfigurationError, match=r"max_params: .*did you mean"):
        layerlens.plan(bert, bert_batches, max_params=500)
    with pytest.raises(ConfigurationError, match="no budget given"):
        layerlens.plan(bert, bert_batches)
    statistics = layerlens.profile(bert, bert_batches)
    with pytest.raises(ConfigurationError, match="max_length: applies when the model is measured"):
        layerlens.choose(statistics, max_trainable_params=500, max_length=8)
