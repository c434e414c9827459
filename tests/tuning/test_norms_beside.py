"""LN tuning beside another method of PEFT, in one directory: no change at step 0, trained, saved, loaded, merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file

from layerlens.engines import VLLM
from layerlens.exceptions import ManifestError
from layerlens.methods import injected_sizes
from layerlens.models import Choice, LoraSettings, Option
from layerlens.tuning import apply, load, merge, save, unapply
from layerlens.tuning.export import export_adapter
from layerlens.tuning.served import read_adapter, why_not_served

LINEAR, OTHER = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.intermediate.dense"
NORMS = ("bert.encoder.layer.0.attention.output.LayerNorm", "bert.embeddings.LayerNorm")
IDS = torch.tensor([[1, 5, 7, 7], [2, 5, 3, 9]])
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16, "initializer_range": 0.3, "num_labels": 3,
}  # fmt: skip


@pytest.fixture
def base() -> Any:
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL)).eval()


def choice_of(method: str, size: int = 1, *, heads: tuple[str, ...] = ()) -> Choice:
    options = (Option(LINEAR, method, size), Option(OTHER, method, size), *(Option(x, "ln_tuning", 1) for x in NORMS))
    return Choice(options, lora=LoraSettings(2.0), head_modules=heads)


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def trained(model: Any, choice: Choice) -> Any:
    tuned = apply(model, choice).eval()
    optimizer = torch.optim.SGD([x for x in tuned.parameters() if x.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits(tuned).square().mean().backward()
        assert all(x.grad is not None for x in tuned.parameters() if x.requires_grad)
        optimizer.step()
    return tuned


@pytest.mark.parametrize(("method", "size"), [("lora", 2), ("dora", 2), ("ia3", 1), ("bitfit", 1)])
@pytest.mark.parametrize("heads", [(), ("classifier",)], ids=["no head", "head"])
def test_both_in_one_directory(base: Any, method: str, size: int, heads: tuple[str, ...], tmp_path: Path):
    choice = choice_of(method, size, heads=heads)
    before, again = logits(base).detach(), [copy.deepcopy(base) for _ in range(4)]
    assert choice.peft_method == method
    assert [option.layer for option in choice.copied_options] == list(NORMS)
    tuned = apply(again[0], choice).eval()
    assert torch.equal(logits(tuned), before)
    assert injected_sizes(tuned) == {x.layer: (x.method, x.rank) for x in choice.options}
    tuned = trained(again[1], choice)
    after = logits(tuned).detach()
    norm = tuned.get_submodule(f"base_model.model.{NORMS[0]}.modules_to_save.default")
    assert not torch.equal(norm.weight, torch.ones(16))
    save(tuned, tmp_path)
    ours, stock = load(again[2], tmp_path), PeftModel.from_pretrained(again[3], str(tmp_path)).eval()
    assert torch.equal(logits(ours.eval()), after)
    assert torch.equal(logits(stock), after)
    assert injected_sizes(ours) == injected_sizes(tuned)
    # W + (alpha/r)·B·A, or l ∘ W, rounds once for each weight.
    assert torch.allclose(logits(merge(ours)), after, atol=1e-5)
    assert torch.equal(logits(unapply(tuned)), before)


@pytest.mark.parametrize(("method", "size"), [("lora", 2), ("ia3", 1)])
def test_the_exported_directory_is_for_stock_peft(base: Any, method: str, size: int, tmp_path: Path):
    choice, before = choice_of(method, size), logits(base).detach()
    export_adapter(choice, base, tmp_path)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {f"base_model.model.{name}.{part}" for name in NORMS for part in ("weight", "bias")} <= set(tensors)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "peft"), is_trainable=True).eval()
    assert torch.equal(logits(stock), before)
    counted = sum(x.numel() for x in stock.parameters() if x.requires_grad)
    assert counted == sum(x.numel() for x in tensors.values())
    assert "2 tuned norms (modules_to_save)" in (tmp_path / "peft" / "README.md").read_text()


def test_norms_alone_are_a_directory_of_their_own_and_engines_hold_none(base: Any, tmp_path: Path):
    alone = Choice(tuple(Option(name, "ln_tuning", 1) for name in NORMS))
    assert (alone.peft_method, alone.copied_options) == ("ln_tuning", ())
    save(trained(base, choice_of("lora", 2)), tmp_path)
    (reason,) = why_not_served(VLLM, read_adapter(tmp_path))
    assert "modules_to_save" in reason


def test_two_others_are_refused_as_before(base: Any):
    options = (Option(LINEAR, "lora", 1), Option(OTHER, "ia3", 1), Option(NORMS[0], "ln_tuning", 1))
    with pytest.raises(ManifestError, match="cannot have ia3 and lora"):
        apply(base, Choice(options, lora=LoraSettings(2.0)))
