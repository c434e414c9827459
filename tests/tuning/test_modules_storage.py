"""Adapters and prefixes on disk: saved and loaded they give equal logits, and a foreign file is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerlens.exceptions import ManifestError
from layerlens.methods import attached
from layerlens.tuning import apply, export_adapter, load_modules, save_modules


def shake(model):
    """Every trainable parameter away from its start, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_trained_mixture_comes_back_bit_for_bit(tiny, manifest_of, mixed, tmp_path, architecture):
    from peft import PeftModel

    base = tiny(architecture)
    tuned = apply(base.model, manifest_of(base.spec, mixed(base.spec)))
    shake(tuned)
    expected = base.logits(tuned.eval())
    tuned.save_pretrained(tmp_path / "peft")
    save_modules(tuned, tmp_path / "layerlens_modules.safetensors")

    fresh = tiny(architecture)
    loaded = PeftModel.from_pretrained(fresh.model, str(tmp_path / "peft"), is_trainable=True)
    load_modules(loaded, tmp_path / "layerlens_modules.safetensors")
    assert (expected - tiny(architecture).logits()).abs().max() > 1e-2
    assert (fresh.logits(loaded.eval()) - expected).abs().max() == 0.0
    count = lambda model: sum(value.numel() for value in model.parameters() if value.requires_grad)  # noqa: E731
    assert count(loaded) == count(tuned)


def test_without_lora_the_head_is_in_the_same_file(tiny, manifest_of, mixed, tmp_path):
    base = tiny("bert")
    choice = {name: option for name, option in mixed(base.spec).items() if option[0] != "lora"}
    tuned = apply(base.model, manifest_of(base.spec, choice))
    shake(tuned)
    path = save_modules(tuned, tmp_path / "modules.safetensors")
    assert "classifier.weight" in load_file(path)
    fresh = tiny("bert")
    load_modules(fresh.model, path, trainable=False)
    assert torch.equal(fresh.logits(), base.logits())
    assert not any(value.requires_grad for _, module in attached(fresh.model).values() for value in module.parameters())


def test_the_exported_zero_step_equals_the_injected_one(tiny, manifest_of, mixed, tmp_path):
    base = tiny("bert")
    manifest = manifest_of(base.spec, mixed(base.spec))
    written = export_adapter(manifest, base.model, tmp_path)
    fresh = tiny("bert")
    load_modules(fresh.model, written["modules"])
    exported = load_file(written["peft"] / "adapter_model.safetensors")
    tuned = apply(base.model, manifest)
    state = tuned.state_dict()
    for name, tensor in exported.items():
        of_head = name.replace(".classifier.", ".classifier.modules_to_save.default.")
        assert torch.equal(state[of_head if of_head != name else name.replace(".weight", ".default.weight")], tensor)
    for layer, (method, module) in attached(tuned.get_base_model()).items():
        assert attached(fresh.model)[layer][0] == method
        for name, tensor in attached(fresh.model)[layer][1].state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor)


def test_bad_files_are_refused_and_leave_the_model_alone(tiny, manifest_of, mixed, tmp_path):
    base = tiny("bert")
    tuned = apply(base.model, manifest_of(base.spec, {k: v for k, v in mixed(base.spec).items() if v[0] != "lora"}))
    good = save_modules(tuned, tmp_path / "good.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-8])
    fresh = tiny("bert")
    for name, message in (
        ("missing", "no such file"),
        ("text", "not a file of LayerLens"),
        ("foreign", "not a file of LayerLens"),
        ("cut", "not a file of LayerLens"),
    ):
        with pytest.raises(ManifestError, match=message):
            load_modules(fresh.model, tmp_path / f"{name}.safetensors")
    with pytest.raises(ManifestError, match="no module"):
        load_modules(tiny("gpt2").model, good)
    assert attached(fresh.model) == {}
    with pytest.raises(ManifestError, match="nothing to save"):
        save_modules(fresh.model, tmp_path / "none.safetensors")
    load_modules(fresh.model, good)
    with pytest.raises(ManifestError, match="already has"):
        load_modules(fresh.model, good)
