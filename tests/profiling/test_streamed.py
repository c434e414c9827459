"""A streamed model gives the very bytes of one in memory, and what cannot be streamed says so."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import transformers as hf
from brute_force import pieces
from streamed_support import ClassItself, Saved, save
from test_architectures import CASES, SMALL, WIDTHS, spec_of, text, token_labels

from layerlens.exceptions import (
    ConfigurationError,
    ModelNotFoundError,
    ModelSpecError,
    OutputError,
    ProfilingError,
)
from layerlens.integrations.pretrained import weights_fingerprint
from layerlens.integrations.safetensors_files import checkpoint_tensors, read_tensor
from layerlens.integrations.skeleton import load_skeleton
from layerlens.profiling.measure import measure
from layerlens.profiling.request import BY_SAMPLES
from layerlens.profiling.streamed.measure_streamed import measure_streamed
from layerlens.profiling.streamed.parts import ModelParts
from layerlens.tasks.batches import Batch

FAMILIES = (
    "bert-classification", "bert-masked-lm-tied", "roberta-regression", "gpt2-causal-tied", "llama-causal-gqa",
    "qwen3-causal-tied", "vit",
)  # fmt: skip
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_statistic_has_the_same_bits_as_in_memory(tmp_path: Path, name: str):
    saved = save(name, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert saved.streamed() == saved.in_memory()
    for statistics in (("fisher",), ("gradient", "spectrum"), ()):
        assert saved.streamed(statistics, everything=False) == saved.in_memory(statistics, everything=False)


@pytest.mark.parametrize("name", ["llama-causal-gqa", "bert-masked-lm-tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_same_bits_as_in_memory(tmp_path: Path, name: str, dtype: torch.dtype):
    saved = save(name, tmp_path, dtype)
    assert saved.streamed() == saved.in_memory()


def test_sketches_have_the_same_bits_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("layerlens.profiling.request.EXACT_NTK_SAMPLES", 2)  # small as the model is
    monkeypatch.setattr("layerlens.profiling.accumulators.worth_sketching", lambda shape: shape[0] == 1)
    saved = save("llama-causal-gqa", tmp_path)
    assert saved.streamed() == saved.in_memory()


def test_one_block_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved = save("llama-causal-gqa", tmp_path)
    seen: list[tuple[int, set[str]]] = []
    run_block = ModelParts.run_block

    def watched(parts: ModelParts, number: int, *arguments: object) -> torch.Tensor:
        there = {name for name, x in parts.model.named_parameters() if x.untyped_storage().nbytes() >= x.nbytes}
        loaded = {name.rsplit(".layers.", 1)[-1][0] for name in there}
        seen.append((number, loaded))
        return run_block(parts, number, *arguments)

    monkeypatch.setattr(ModelParts, "run_block", watched)
    saved.streamed(("gradient",), everything=False)
    assert {number for number, _ in seen} == {0, 1}
    assert all(loaded == {str(number)} for number, loaded in seen)


def test_the_skeleton_has_the_new_head_and_buffers_that_a_loaded_model_has(tmp_path: Path):
    hf.LlamaModel(hf.LlamaConfig(**SMALL, **WIDTHS, num_key_value_heads=2)).save_pretrained(tmp_path)
    auto = hf.AutoModelForSequenceClassification
    torch.manual_seed(5)
    loaded = auto.from_pretrained(tmp_path, num_labels=3)
    torch.manual_seed(5)
    skeleton, info, weights = load_skeleton(auto, tmp_path, {"num_labels": 3}, torch.float32)
    assert info["missing_keys"] == {"score.weight"}
    assert torch.equal(skeleton.score.weight, loaded.score.weight)
    assert all(x.is_meta for name, x in skeleton.named_parameters() if name != "score.weight")
    buffers = dict(skeleton.named_buffers())
    assert buffers
    assert all(torch.equal(buffers[name], x) for name, x in loaded.named_buffers())
    assert weights.fingerprint(skeleton) == weights_fingerprint(loaded)
    assert weights.fingerprint(skeleton, ["score.weight"]) == weights_fingerprint(loaded, ["score.weight"])


def test_weights_are_converted_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("layerlens.integrations.safetensors_files.CHUNK_BYTES", 96)  # several pieces for each tensor
    saved = save("llama-causal-gqa", tmp_path, torch.bfloat16)
    for name, place in checkpoint_tensors(tmp_path).items():
        out = torch.empty(place.shape, dtype=torch.float32)
        read_tensor(place, out)
        assert torch.equal(out, saved.model.state_dict()[name].float())


def damage(directory: Path, how: str) -> str:
    """Damage a checkpoint; what the error must name."""
    index = json.loads((directory / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    if how == "tensor not in its shard":
        index["weight_map"][name] = next(x for x in index["weight_map"].values() if x != shard)
        (directory / INDEX).write_text(json.dumps(index))
        return name
    if how == "not an index":
        (directory / INDEX).write_text("[]")
        return INDEX
    if how == "no shard":
        (directory / shard).unlink()
        return shard
    data = bytearray((directory / shard).read_bytes())
    if how == "header length":
        data[:8] = (2**40).to_bytes(8, "little")
    elif how == "header text":
        data[8:12] = b"\xff\xff\xff\xff"
    elif how == "cut short":
        data = data[:-4]
    (directory / shard).write_bytes(data)
    return shard


@pytest.mark.parametrize(
    "how", ["tensor not in its shard", "not an index", "no shard", "header length", "header text", "cut short"]
)
def test_a_damaged_checkpoint_is_refused_by_file(tmp_path: Path, how: str):
    saved = save("llama-causal-gqa", tmp_path)
    named = damage(tmp_path, how)
    with pytest.raises(ModelNotFoundError, match=named.replace(".", r"\.")) as found:
        saved.skeleton()
    assert "\n" not in str(found.value)


def test_a_checkpoint_without_safetensors_is_refused(tmp_path: Path):
    saved = save("llama-causal-gqa", tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ModelNotFoundError, match="only safetensors can be streamed"):
        saved.skeleton()


def test_a_disk_without_room_is_refused_before_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved = save("llama-causal-gqa", tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 4096, 4096))
    with pytest.raises(OutputError, match="of activations at block boundaries"):
        saved.streamed(("gradient",), everything=False)


def streamed_with(saved: Saved, change) -> None:
    skeleton, weights = saved.skeleton()
    change(skeleton)
    measure_streamed(skeleton, weights, saved.spec, saved.batches, **saved.settings(("gradient",), everything=False))


def call_the_first_block_again(skeleton) -> None:
    skeleton.model.layers[1] = skeleton.model.layers[0]


def compute_between_blocks(skeleton) -> None:
    first = skeleton.model.layers[0]
    first.register_forward_hook(lambda module, args, output: output * 2)


def use_embeddings_after_the_blocks(skeleton) -> None:
    skeleton.lm_head.register_forward_pre_hook(
        lambda module, args: (args[0] + skeleton.model.embed_tokens(torch.ones(1, 1, dtype=torch.int64)),)
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (call_the_first_block_again, "calls a block twice"),
        (compute_between_blocks, "computes something between its blocks"),
        (use_embeddings_after_the_blocks, "calls model.embed_tokens before its blocks and after them"),
    ],
)
def test_models_that_are_no_plain_stack_are_refused(tmp_path: Path, change, reason: str):
    with pytest.raises(ProfilingError, match=f"LlamaForCausalLM {reason}.* cannot be streamed block by block"):
        streamed_with(save("llama-causal-gqa", tmp_path), change)


def test_weights_that_are_used_where_they_are_not_in_memory_are_noticed(tmp_path: Path):
    def borrow(skeleton) -> None:
        elsewhere = skeleton.model.layers[0].mlp.up_proj
        skeleton.model.norm.register_forward_hook(lambda module, args, output: output + elsewhere.weight[0])

    with pytest.raises(ProfilingError, match=r"the loss is not finite on calibration sample 0; .* cannot be streamed"):
        streamed_with(save("llama-causal-gqa", tmp_path), borrow)


def test_a_model_without_blocks_that_are_known_is_refused(tmp_path: Path):
    saved = save("bert-classification", tmp_path / "inputs")
    config = hf.AlbertConfig(**SMALL, **WIDTHS, embedding_size=8, num_labels=3)
    hf.AlbertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    other = Saved(hf.AlbertForSequenceClassification(config), saved.case, saved.batches, saved.spec, tmp_path / "model")
    with pytest.raises(ProfilingError, match="cannot be streamed block by block"):
        other.streamed(("gradient",), everything=False)


def test_encoder_and_decoder_and_mixtures_are_refused(tmp_path: Path):
    t5 = hf.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    hf.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelSpecError, match="only single stacks can be streamed"):
        load_skeleton(ClassItself(hf.T5ForConditionalGeneration), tmp_path / "t5", {}, torch.float32)
    mixture = hf.MixtralConfig(**SMALL, **WIDTHS, num_key_value_heads=2, num_local_experts=2)
    hf.MixtralForCausalLM(mixture).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(ModelSpecError, match="mixtures of experts"):
        load_skeleton(ClassItself(hf.MixtralForCausalLM), tmp_path / "mixtral", {}, torch.float32)


@pytest.mark.parametrize("name", ["activation_memory", "flops", "time"])
def test_statistics_of_the_whole_model_are_refused_by_name(tmp_path: Path, name: str):
    saved = save("llama-causal-gqa", tmp_path)
    with pytest.raises(ConfigurationError, match=f"profiling.statistics: {name}"):
        saved.streamed((name,), everything=False)


def test_a_loss_that_is_not_finite_names_the_sample(tmp_path: Path):
    saved = save("bert-classification", tmp_path)
    with torch.no_grad():
        saved.model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    saved.model.save_pretrained(tmp_path, max_shard_size="4KB")
    with pytest.raises(ProfilingError, match=r"encoder.layer.1 puts out is not finite on calibration sample 0"):
        saved.streamed(("gradient",), everything=False)


def test_padding_on_the_left_and_labels_of_tokens(tmp_path: Path):
    saved = save("gpt2-causal-tied", tmp_path)
    batch = text(lambda inputs: token_labels(inputs, 40))()
    saved.batches = [batch]
    flipped = {name: x.flip(1) for name, x in batch.inputs.items()}
    object.__setattr__(batch, "inputs", flipped)
    object.__setattr__(batch, "labels", batch.labels.flip(1))
    assert saved.streamed(BY_SAMPLES) == saved.in_memory(BY_SAMPLES)


ODD = {
    "deberta-v2": lambda: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(
            **SMALL, **WIDTHS, num_labels=2, relative_attention=True, position_buckets=4, max_relative_positions=-1,
            pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
        )
    ),
    "opt": lambda: hf.OPTForSequenceClassification(
        hf.OPTConfig(
            vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, num_labels=2,
            max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=0,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_rows_that_are_not_the_samples_are_found_out_block_by_block(tmp_path: Path, name: str):
    """DeBERTa's projected positions are one row for all samples, OPT's feed-forward layers see flattened tokens.

    In memory DeBERTa's samples are measured one by one in the whole model, here in its blocks, so sums have another
    order: float64, some thousand products, and 1e-9 leaves four decimal digits.
    """
    torch.manual_seed(1)
    model = ODD[name]().double()
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (5, 6), generator=generator)
    whole = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(5) % 2, torch.arange(5))
    case = CASES["bert-classification"]
    saved = Saved(model, case, pieces(whole, 1, 3, 1), spec_of(model), tmp_path)
    settings = saved.settings(("fisher", "gradient"), everything=False)
    expected = measure(model, saved.spec, saved.batches, **settings)
    found = measure_streamed(*saved.skeleton(), saved.spec, saved.batches, **settings)
    assert found.unmeasured == expected.unmeasured == {}
    assert [layer.layer for layer in found.layers] == [layer.layer for layer in expected.layers]
    for layer, other in zip(found.layers, expected.layers, strict=True):
        for method, measured in layer.by_method.items():
            assert measured.energy == pytest.approx(other.by_method[method].energy, rel=1e-9), (layer.layer, method)
            assert measured.trace == pytest.approx(other.by_method[method].trace, rel=1e-9), (layer.layer, method)
