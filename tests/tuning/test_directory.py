"""save, load and merge: PEFT reads its part alone, merged logits agree, and damaged or foreign files are refused."""

from __future__ import annotations

import json

import pytest
import torch
from shapes import plan, shake, shape

from layerlens.exceptions import ManifestError, OutputError
from layerlens.methods import attached
from layerlens.tuning import apply, load, merge, save


def tuned(architecture="bert", methods=("lora", "adapter", "prefix"), **lora):
    base = shape(architecture)
    choice = {name: option for name, option in base.choice.items() if option[0] in methods}
    model = apply(base.model, plan(base.model, choice, kv_width=base.kv_width, lora=lora))
    shake(model)
    return base, model


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5"])
def test_stock_peft_reads_its_part_alone(architecture, tmp_path):
    from peft import PeftModel

    base, model = tuned(architecture, ("lora",), use_rslora=True)
    expected = base.logits(model)
    assert set(save(model, tmp_path)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    fresh = shape(architecture)
    assert (fresh.logits(PeftModel.from_pretrained(fresh.model, str(tmp_path))) - expected).abs().max() == 0.0

    base, model = tuned(architecture)
    save(model, tmp_path)
    fresh = shape(architecture)
    alone = PeftModel.from_pretrained(fresh.model, str(tmp_path)).state_dict()
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(alone[name], tensor)


def test_saving_again_leaves_nothing_stale_and_other_files_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    _, model = tuned()
    save(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    _, other = tuned(methods=("adapter", "prefix"))
    assert set(save(other, tmp_path)) == {"layerlens_modules.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "layerlens_modules.safetensors"}
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        save(model, file)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "vit"])
def test_merged_logits_agree(architecture):
    base, model = tuned(architecture, ("lora",))
    expected = base.logits(model)
    merged = merge(model)
    assert type(merged) is type(shape(architecture).model)
    # One more rounding of each weight (2^-24 relative); two blocks of widths ≤ 48 pass it on with gains below 100.
    torch.testing.assert_close(base.logits(merged), expected, rtol=0, atol=expected.abs().max() * 2**-24 * 48 * 100)
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_what_cannot_be_merged_is_named():
    _, model = tuned()
    with pytest.raises(
        ManifestError, match=r"adapter on bert.encoder.layer.0.output.dense, prefix on .* and|prefix on"
    ):
        merge(model)
    assert attached(model.get_base_model())
    with pytest.raises(ManifestError, match="has no LoRA layers"):
        merge(shape("bert").model)
    _, model = tuned(methods=("lora",))
    next(value for name, value in model.named_parameters() if "lora_A" in name).data[0, 0] = float("nan")
    with pytest.raises(ManifestError, match="not finite"):
        merge(model)


def test_a_merged_layer_is_not_unapplied():
    from layerlens.tuning import unapply

    _, model = tuned(methods=("lora",))
    model.merge_adapter()
    with pytest.raises(ManifestError, match="is merged into the weight"):
        unapply(model)
    with pytest.raises(ManifestError, match="holds nothing"):
        unapply(shape("bert").model)


def test_bad_directories_are_refused_and_leave_the_model_alone(tmp_path):
    _, model = tuned()
    save(model, tmp_path / "good")
    weights = (tmp_path / "good/adapter_model.safetensors").read_bytes()
    modules = (tmp_path / "good/layerlens_modules.safetensors").read_bytes()
    config = json.loads((tmp_path / "good/adapter_config.json").read_text())

    def directory(name, config_text=None, weight_bytes=weights, module_bytes=modules):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(config_text or json.dumps(config))
        if weight_bytes is not None:
            (tmp_path / name / "adapter_model.safetensors").write_bytes(weight_bytes)
        (tmp_path / name / "layerlens_modules.safetensors").write_bytes(module_bytes)
        return tmp_path / name

    cases = [
        (tmp_path, "has neither adapter_config.json nor layerlens_modules.safetensors"),
        (directory("cut", weight_bytes=weights[:-10]), "adapter_model.safetensors: is damaged or cut short"),
        (directory("gone", weight_bytes=None), "adapter_model.safetensors: no such file"),
        (directory("text", config_text="{}x"), "adapter_config.json: not a PEFT configuration"),
        (directory("cut2", module_bytes=modules[:-10]), "layerlens_modules.safetensors: not a file of LayerLens"),
    ]
    fresh = shape("bert")
    names = [name for name, _ in fresh.model.named_modules()]
    for path, message in cases:
        with pytest.raises(ManifestError, match=message):
            load(fresh.model, path)
        assert [name for name, _ in fresh.model.named_modules()] == names
    (tmp_path / "good/layerlens_modules.safetensors").unlink()
    for other, message in (
        (shape("vit").model, "no module 'bert.encoder.layer.0.attention.self.query'"),
        (narrow_bert(), r"lora_A.weight is \(2, 32\), which does not fit this 16 → 16 Linear"),
        (bert_with_labels(5), "load it with the same number of labels"),
    ):
        with pytest.raises(ManifestError, match=message):
            load(other, tmp_path / "good")
    loaded = load(fresh.model, tmp_path / "good")
    with pytest.raises(ManifestError, match="already has"):
        load(loaded, tmp_path / "good")


def test_the_base_model_is_recognised(tmp_path):
    _, model = tuned()
    save(model, tmp_path)
    with pytest.raises(ManifestError, match=r"these are not the weights that .*layerlens_modules.safetensors was made"):
        load(shape("bert", seed=1).model, tmp_path)
    load(shape("bert", seed=1).model, tmp_path, check_fingerprint=False)
    with_new_head = shape("bert").model
    torch.nn.init.normal_(with_new_head.classifier.weight)
    load(with_new_head, tmp_path)


def test_loaded_for_use_nothing_trains(tmp_path):
    _, model = tuned()
    save(model, tmp_path)
    assert not any(value.requires_grad for value in load(shape("bert").model, tmp_path, trainable=False).parameters())


def narrow_bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))


def bert_with_labels(count):
    base = shape("bert").model
    base.classifier = torch.nn.Linear(32, count)
    return base


def test_sets_of_the_configuration_are_written_in_one_order(tmp_path):
    """Python's order of a set of strings differs from process to process, and with it were the file's bytes."""
    _, model = tuned(methods=("lora",))
    config = model.peft_config["default"]
    names = sorted(config.target_modules)
    assert len(names) > 1
    save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == names
