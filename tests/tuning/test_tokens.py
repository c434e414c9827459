"""Rows of new tokens: resized as transformers does it, trained by both of PEFT's ways, saved, loaded, merged."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from layerlens.engines import VLLM
from layerlens.exceptions import ManifestError, ModelSpecError
from layerlens.integrations.pretrained import weights_fingerprint
from layerlens.integrations.token_embeddings import training_of, with_tokens
from layerlens.models import Choice, LoraSettings, Option
from layerlens.models.tokens import ROWS, WHOLE, TokenRequest, TokenTraining
from layerlens.tuning import apply, load, merge, save, unapply
from layerlens.tuning.export import export_adapter
from layerlens.tuning.served import read_adapter, why_not_served

OLD, NEW = 40, 43
IDS = torch.tensor([[1, 41, 7, 42], [40, 5, 3, 2]])
SMALL: dict[str, Any] = {
    "vocab_size": OLD, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "initializer_range": 0.3,
}  # fmt: skip


@dataclass
class Words:
    """All of a tokenizer that is asked."""

    size: int

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {f"w{index}": index for index in range(self.size)}


def llama(tied: bool) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=tied, pad_token_id=0))


def gemma() -> Any:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8))


def gpt2() -> Any:
    config = hf.GPT2Config(
        vocab_size=OLD, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config)


def t5() -> Any:
    config = hf.T5Config(vocab_size=OLD, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0)
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config)


def bart() -> Any:
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder")
             for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    return hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=OLD, d_model=16, scale_embedding=True, max_position_embeddings=32, pad_token_id=0,
                      bos_token_id=0, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None, **sizes)
    )  # fmt: skip


def phi() -> Any:
    return hf.PhiForCausalLM(hf.PhiConfig(**SMALL))


def bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3, max_position_embeddings=16))


def bert_words() -> Any:
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, max_position_embeddings=16))


KINDS: dict[str, tuple[Any, str, int]] = {
    "llama": (lambda: llama(False), "model.layers.0.mlp.up_proj", 2),
    "tied llama": (lambda: llama(True), "model.layers.0.mlp.up_proj", 1),
    "gemma": (gemma, "model.layers.0.mlp.up_proj", 1),
    "gpt2": (gpt2, "transformer.h.0.mlp.c_fc", 1),
    "t5": (t5, "encoder.block.0.layer.1.DenseReluDense.wi", 1),
    "bart": (bart, "model.encoder.layers.0.fc1", 1),
    "phi": (phi, "model.layers.0.mlp.fc1", 2),
    "bert": (bert, "bert.encoder.layer.0.intermediate.dense", 1),
}
"""Model, a layer of it, and matrices of token rows (one where the output layer has the same or is none)."""
UNFIT = {("phi", ROWS): "drops the bias", ("gpt2", WHOLE): "would train a copy", ("t5", WHOLE): "would train a copy",
         ("bart", WHOLE): "would train a copy"}  # fmt: skip


def made(kind: str) -> Any:
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    if getattr(getattr(model, "lm_head", None), "bias", None) is not None:
        with torch.no_grad():
            model.lm_head.bias.normal_()
    return model


def resized(model: Any, by: str) -> TokenTraining:
    torch.manual_seed(1)
    found = with_tokens(model, Words(NEW), TokenRequest(resize=True, by=by))
    assert found is not None
    return found


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    found: torch.Tensor = model(input_ids=IDS, **more).logits
    return found


def choice_of(kind: str, tokens: TokenTraining, *rows: Option) -> Choice:
    options = rows or (Option(KINDS[kind][1], "lora", 2),)
    return Choice(options, lora=LoraSettings(2.0), head_modules=tokens.whole_modules, tokens=tokens)


def trained(model: Any, choice: Choice) -> Any:
    tuned = apply(model, choice)
    optimizer = torch.optim.SGD([x for x in tuned.parameters() if x.requires_grad], 0.2)
    for _ in range(2):
        optimizer.zero_grad()
        logits(tuned).square().mean().backward()
        optimizer.step()
    return tuned


WAYS = [(kind, by) for kind in KINDS for by in (ROWS, WHOLE)]


@pytest.mark.parametrize(("kind", "by"), [way for way in WAYS if way not in UNFIT])
def test_trained_saved_loaded_merged_and_taken_out(kind: str, by: str, tmp_path: Path):
    model, matrices = made(kind), KINDS[kind][2]
    small = weights_fingerprint(model)
    tokens = resized(model, by)
    assert weights_fingerprint(model, (), tokens) == small  # as the checkpoint has them
    assert tokens.indices == (40, 41, 42)
    choice = choice_of(kind, tokens)
    before, again = logits(model).detach(), [copy.deepcopy(model) for _ in range(3)]
    tuned = apply(copy.deepcopy(model), choice)
    counted = sum(x.numel() for x in tuned.parameters() if x.requires_grad)
    lora = sum(x.numel() for name, x in tuned.named_parameters() if ".lora_" in name)
    assert counted - lora == tokens.trainable_params
    assert by != ROWS or tokens.trainable_params == matrices * 3 * 16
    # T5's products are laid out otherwise in another place of memory: rounding, 2^-24 of logits of about ten.
    assert torch.allclose(logits(tuned), before, atol=0.0 if kind != "t5" else 5e-6, rtol=0.0)
    tuned = trained(model, choice)
    after = logits(tuned).detach()
    assert float((after - before).abs().max()) > 1e-3
    save(tuned, tmp_path)
    for loaded in (load(again[0], tmp_path), PeftModel.from_pretrained(again[1], str(tmp_path)).eval()):
        assert torch.equal(logits(loaded), after)
    # W + (alpha/r)·B·A rounds once for each weight.
    assert torch.allclose(logits(merge(load(again[2], tmp_path))), after, atol=1e-5)
    taken_out = unapply(tuned)
    assert torch.allclose(logits(taken_out), before, atol=0.0 if kind != "t5" else 5e-6, rtol=0.0)


@pytest.mark.parametrize(("kind", "by"), sorted(UNFIT))
def test_what_peft_computes_wrong_is_refused_with_the_way_out(kind: str, by: str):
    model = made(kind)
    other = WHOLE if by == ROWS else ROWS
    with pytest.raises(ModelSpecError, match=f"model.token_training: .*{UNFIT[kind, by]}.*; set .*: {other}"):
        resized(model, by)
    # What is refused does come out wrong in PEFT: rows set to other values act otherwise than in the model itself.
    model = made(kind)
    model.resize_token_embeddings(NEW)
    first = next(name for name, one in model.named_modules() if one is model.get_input_embeddings())
    own = [] if model.get_output_embeddings().weight is model.get_input_embeddings().weight else ["lm_head"]
    fields: dict[str, Any] = {"modules_to_save": [first], "ensure_weight_tying": True}
    if by == ROWS:
        fields = {"trainable_token_indices": {name: [40, 41, 42] for name in (first, *own)}}
    reference = copy.deepcopy(model)
    stock = get_peft_model(model, LoraConfig(r=1, target_modules="dummy-target-modules", **fields))
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name in (first, *own):
            reference.get_submodule(name).weight[OLD:] = rows
        for parameter in stock.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter[-3:] = rows
        assert not torch.allclose(logits(stock), logits(reference), atol=1e-2)


def test_neither_of_pefts_ways_fits_a_tied_output_layer_with_a_bias():
    torch.manual_seed(0)
    for by in (ROWS, WHOLE):
        with pytest.raises(ModelSpecError, match="PEFT has no other way"):
            with_tokens(bert_words(), Words(NEW), TokenRequest(resize=True, by=by))


@pytest.mark.parametrize("kind", ["llama", "tied llama", "t5", "bert"])
def test_rows_are_trained_where_no_layer_has_lora(kind: str, tmp_path: Path):
    model = made(kind)
    tokens = resized(model, ROWS)
    choice = choice_of(kind, tokens, Option(KINDS[kind][1], "none", 0))
    again, before = copy.deepcopy(model), logits(model).detach()
    tuned = trained(model, choice)
    assert sum(x.numel() for x in tuned.parameters() if x.requires_grad) == tokens.trainable_params
    after = logits(tuned).detach()
    assert float((after - before).abs().max()) > 1e-3
    files = save(tuned, tmp_path)
    assert set(files) >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = load(again, tmp_path)
    assert torch.equal(logits(loaded), after)
    assert torch.allclose(logits(merge(loaded)), after, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_beside_adapters_alone_the_embeddings_are_trained_in_place(kind: str, tmp_path: Path):
    model = made(kind)
    layer = {"gpt2": "transformer.h.0.mlp.c_proj"}.get(kind, "model.layers.0.mlp.down_proj")
    torch.manual_seed(1)
    if kind == "gpt2":  # which PEFT would untie, but nothing of PEFT's is put in
        model.resize_token_embeddings(NEW)
        tokens = TokenTraining(WHOLE, NEW, 16, (40, 41, 42), ("transformer.wte",), ("lm_head",), NEW * 16)
    else:
        tokens = resized(model, WHOLE)
    again = copy.deepcopy(model)
    tuned = trained(model, choice_of(kind, tokens, Option(layer, "adapter", 2)))
    save(tuned, tmp_path)
    assert torch.equal(logits(load(again, tmp_path)), logits(tuned))


@pytest.mark.parametrize("by", [ROWS, WHOLE])
@pytest.mark.parametrize("kind", ["llama", "tied llama"])
def test_the_exported_directory_is_for_stock_peft(kind: str, by: str, tmp_path: Path):
    model = made(kind)
    tokens = resized(model, by)
    choice = choice_of(kind, tokens)
    export_adapter(choice, model, tmp_path)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    rows = {name for name in tensors if "token_adapter" in name}
    assert len(rows) == (len(tokens.modules) if by == ROWS else 0)
    before = logits(model).detach()
    stock = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "peft"), is_trainable=True).eval()
    assert torch.equal(logits(stock), before)
    said = (tmp_path / "peft" / "README.md").read_text()
    assert "base_model.resize_token_embeddings(43)" in said
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["modules_to_save"] or []) == list(tokens.whole_modules)
    assert config["ensure_weight_tying"] == (by == WHOLE and kind == "tied llama")
    trained_whole = {name for name, x in stock.named_parameters() if x.requires_grad and "modules_to_save" in name}
    assert bool(trained_whole) == (by == WHOLE)


def test_a_model_without_the_rows_is_refused_by_the_call_that_lacks(tmp_path: Path):
    model, small = made("llama"), made("llama")
    tokens = resized(model, ROWS)
    tuned = trained(model, choice_of("llama", tokens))
    save(tuned, tmp_path)
    with pytest.raises(ManifestError, match=r"has the rows of token 42, and lm_head has 40; call .*\(43\)"):
        load(small, tmp_path)
    with pytest.raises(ManifestError, match=r"has 40 rows, .* call model.resize_token_embeddings\(43\) first"):
        apply(small, choice_of("llama", tokens))
    assert why_not_served(VLLM, read_adapter(tmp_path)) == ["trained tokens (trainable_token_indices)"]
    whole, saved = made("llama"), tmp_path / "whole"
    save(trained(whole, choice_of("llama", resized(whole, WHOLE))), saved)
    with pytest.raises(ManifestError, match=r"is \(43, 16\), in the base model \(40, 16\); .*resize_token_embeddings"):
        load(small, saved)


def test_which_rows():
    model = made("llama")
    assert with_tokens(model, Words(OLD), TokenRequest(resize=True)) is None
    assert with_tokens(model, Words(30), TokenRequest(resize=True)) is None  # a padded vocabulary
    named = with_tokens(model, Words(30), TokenRequest(tokens=("w7", "w3")))
    assert named is not None
    assert (named.indices, named.rows, named.checkpoint_shapes) == ((3, 7), OLD, {})
    both = with_tokens(model, Words(NEW), TokenRequest(resize=True, tokens=("w7",)))
    assert both is not None
    assert both.indices == (7, 40, 41, 42)
    assert dict(both.checkpoint_shapes) == {"model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16)}
    assert TokenTraining.of(both.described()) == both
    with pytest.raises(ModelSpecError, match=r"model.trainable_tokens: 'x' is not a token of the tokenizer"):
        with_tokens(model, Words(30), TokenRequest(tokens=("x",)))
    with pytest.raises(ModelSpecError, match="'w41' is token 41, and the model has embeddings for 40; set"):
        with_tokens(made("llama"), Words(NEW), TokenRequest(tokens=("w41",)))
    with pytest.raises(ModelSpecError, match="the model has no tokenizer"):
        with_tokens(model, None, TokenRequest(resize=True))
    with pytest.raises(ModelSpecError, match="no one table of token embeddings"):
        with_tokens(torch.nn.Linear(2, 2), Words(3), TokenRequest(resize=True))


def test_new_rows_are_drawn_around_the_mean_and_from_the_callers_seed():
    one, other = made("llama"), made("llama")
    for model in (one, other):
        resized(model, ROWS)
    weight = one.get_input_embeddings().weight
    assert torch.equal(weight, other.get_input_embeddings().weight)
    # transformers draws with 1e-9 of the covariance, so a row is within some 1e-4 of the mean.
    assert torch.allclose(weight[OLD:], weight[:OLD].mean(dim=0).expand(3, -1), atol=1e-3)


@pytest.mark.parametrize(
    "values",
    [{}, {"by": "x"}, {"indices": [44]}, {"indices": ["a"]}, {"modules": []}, {"rows": 0}, {"checkpoint_shapes": 3}],
    ids=str,
)
def test_a_damaged_description_is_refused(values: dict[str, Any]):
    described = training_of(made("llama"), [1], ROWS).described()
    with pytest.raises(ManifestError, match=r"model\.tokens"):
        TokenTraining.of({**described, **values} if values else {})
    assert TokenTraining.of(described).indices == (1,)


def test_rows_do_not_go_beside_a_method_whose_configuration_has_none():
    tokens = training_of(made("llama"), [1], ROWS)
    choice = choice_of("llama", tokens, Option(KINDS["llama"][1], "ia3", 1))
    with pytest.raises(ManifestError, match="cannot have ia3 and trainable_token_indices"):
        apply(made("llama"), choice)
