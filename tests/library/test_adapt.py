"""``layerlens.adapt``: two lines in a script, then training, saving, and loading in stock PEFT without LayerLens."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from picture import differences, picture
from trainer_support import causal_model, classifier, dpo, language_model, reward, sentence_trainer, sft
from transformers import Trainer
from transformers.integrations.peft import MIN_PEFT_VERSION

import layerlens
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.peft import injected_ranks
from layerlens.integrations.transformers import blocks_to_checkpoint

SETTINGS = {"max_trainable_params": "1k", "calibration_samples": 8, "threads": 1}
TRAINERS = {
    "classifier": classifier,
    "causal": language_model,
    "causal, checkpointed": lambda folder, **more: language_model(folder, gradient_checkpointing=True, **more),
    "sft": sft,
    "sft, packed": lambda folder, **more: sft(folder, packing=True, **more),
    "dpo": dpo,
    "dpo, no reference given": lambda folder, **more: dpo(folder, "saved", **more),
    "dpo, computed before": lambda folder, **more: dpo(folder, precompute_ref_log_probs=True, **more),
    "reward": reward,
}


def base_weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("name", TRAINERS)
def test_adapted_trained_saved_and_loaded_by_stock_peft(name, tmp_path):
    trainer = TRAINERS[name](tmp_path)
    kind, weights = type(trainer.model), base_weights(trainer.model)
    config = trainer.model.config
    plan = layerlens.adapt(trainer, **SETTINGS)
    assert isinstance(trainer.model, PeftModel)
    ranks = {
        key: layer.r["default"]
        for key, layer in trainer.model.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }
    assert ranks == plan.ranks
    trainer.train()
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert all("lora_" in one or "modules_to_save" in one for one in trained)
    assert any("modules_to_save" in one for one in trained) == (name in ("classifier", "reward"))
    trainer.save_model(str(tmp_path / "saved"))
    again = kind(config)
    again.load_state_dict(weights)
    again = PeftModel.from_pretrained(again, tmp_path / "saved").eval()
    words = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        before = kind(config)
        before.load_state_dict(weights)
        found, wanted = again(words).logits, trainer.model.eval()(words).logits
        assert torch.equal(found, wanted)
        assert not torch.equal(wanted, before.eval()(words).logits)  # it has learned something


def test_blocks_that_the_plan_checkpoints_are_checkpointed_in_the_trainer(tmp_path):
    profile = {"batch_size": 64, "sequence_length": 64}  # activations beside which the tiny weights are small
    settings = {**SETTINGS, "latency_profile": profile}
    uses = []
    for checkpointing in (False, True):
        trainer = language_model(tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        plan = layerlens.adapt(trainer, **settings)
        assert bool(plan.choice.checkpointed) == checkpointing
        uses.append(next(use.total for use in plan.manifest.resources if use.resource == "vram_gb"))
    assert uses[1] < uses[0]
    trainer = language_model(tmp_path / "auto")
    plan = layerlens.adapt(trainer, **settings, max_vram_gb=1.02 * uses[1], gradient_checkpointing="auto")
    assert plan.choice.checkpointed
    trainer.train()
    blocks = blocks_to_checkpoint(trainer.model)
    found = {name.removeprefix("base_model.model.") for name, block in blocks.items() if block.gradient_checkpointing}
    assert found == set(plan.choice.checkpointed)
    other = peft.get_peft_model(causal_model(), plan.lora_config(causal_model()))
    plan.checkpoint(other)
    flags = {name for name, block in blocks_to_checkpoint(other).items() if block.gradient_checkpointing}
    assert {name.removeprefix("base_model.model.") for name in flags} == found


def test_training_is_that_of_a_trainer_made_with_the_configuration(tmp_path):
    """The same weights as SFTTrainer(peft_config=...) has after its steps."""
    trainer = sft(tmp_path / "adapted")
    plan = layerlens.adapt(trainer, **SETTINGS)
    made = sft(tmp_path / "made", peft_config=plan.lora_config(causal_model()))
    weights = dict(made.model.named_parameters())
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            weights[name].copy_(weight)
    for one in (trainer, made):
        torch.manual_seed(3)
        one.train()
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("ref_model", ["copy", "saved"])
def test_a_copy_of_the_model_as_reference_is_let_go(ref_model, tmp_path):
    """As TRL has it with an adapter: the reference is the model with the adapter off."""
    trainer = dpo(tmp_path, ref_model)
    layerlens.adapt(trainer, **SETTINGS)
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_another_reference_stays(tmp_path):
    other = causal_model()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    trainer = dpo(tmp_path, other)
    layerlens.adapt(trainer, **SETTINGS)
    assert trainer.ref_model is other


def test_a_sentence_transformer_holds_the_adapter_itself(tmp_path):
    from sentence_transformers import SentenceTransformer

    trainer = sentence_trainer(tmp_path)
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # transformers then cannot put it in
        before = picture(vars(trainer))
        with pytest.raises(ConfigurationError, match=f"SentenceTransformer.*PEFT {MIN_PEFT_VERSION} or newer"):
            layerlens.adapt(trainer, **SETTINGS)
        assert differences(before, picture(vars(trainer))) == []
        return
    plan = layerlens.adapt(trainer, **SETTINGS)
    inner = trainer.model.transformers_model
    assert injected_ranks(inner) == plan.ranks
    assert all("lora_" in name for name, weight in inner.named_parameters() if weight.requires_grad)
    before = trainer.model.encode(["the cat sat"])
    trainer.train()
    after = trainer.model.encode(["the cat sat"])
    assert (before != after).any()
    trainer.save_model(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (again.encode(["the cat sat"]) == after).all()


def trained(folder):
    trainer = classifier(folder)
    trainer.train()
    return trainer


def with_optimizer(folder):
    made = classifier(folder)
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    return Trainer(made.model, made.args, train_dataset=made.train_dataset, optimizers=(optimizer, None))


def wrapped(folder):
    return sft(folder, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


def with_model_init(folder):
    made = classifier(folder)
    return Trainer(args=made.args, train_dataset=made.train_dataset, model_init=lambda: made.model)


@pytest.mark.parametrize(
    ("make", "settings", "says"),
    [
        (trained, {}, "already has an optimizer.*before train"),
        (with_optimizer, {}, "already has an optimizer.*optim="),
        (with_model_init, {}, "new model in train.*model_init"),
        (lambda folder: dpo(folder, "saved", sync_ref_model=True), {}, "sync_ref_model"),
        (
            lambda folder: sft(folder, peft_config=LoraConfig(r=2, target_modules=["q_proj"])),
            {},
            "PEFT adapter already",
        ),
        (lambda folder: causal_model(), {}, "must be a transformers.Trainer.*LlamaForCausalLM"),
        (classifier, {"methods": ["lora", "prefix"]}, "only LoRA.*plan.apply"),
        (classifier, {"max_trainable_params": None}, "budget"),
    ],
)
def test_what_cannot_be_adapted_is_refused_unchanged(make, settings, says, tmp_path):
    trainer = make(tmp_path)
    before = picture(vars(trainer))
    with pytest.raises(ConfigurationError, match=says):
        layerlens.adapt(trainer, **{**SETTINGS, **settings})
    assert differences(before, picture(vars(trainer))) == []
