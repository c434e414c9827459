"""Tiny random models of many shapes with one mixed choice each: LoRA, an adapter and prefixes on different layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layerlens.integrations.peft import lora_shape
from layerlens.integrations.pretrained import weights_fingerprint
from layerlens.models import LoraSettings, Manifest, ManifestRow, ModelFacts, Provenance

HEADS, WIDTH, KV_WIDTH = 4, 32, {"llama": 16}  # query heads, width of all query heads, of all key/value heads


@dataclass(frozen=True)
class Shape:
    """A model in evaluation mode, inputs with labels, and a choice that mixes methods."""

    model: Any
    inputs: dict[str, torch.Tensor]
    choice: dict[str, tuple[str, int]]
    kv_width: int = WIDTH
    generates: bool = False

    def logits(self, model: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return (self.model if model is None else model).eval()(**self.inputs).logits.clone()


def shape(architecture: str, attention: str = "sdpa", seed: int = 0) -> Shape:
    """One of SHAPES; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return SHAPES[architecture](attention)


def _text(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, **more}


# Wide initial weights: with the usual 0.02 nothing that attention does would show in the logits.
_COMMON: dict[str, Any] = {"initializer_range": 0.2}
_WORDS: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
_WIDE = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}


def _bert(attention: str) -> Shape:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**_WIDE, **_COMMON, vocab_size=50, num_labels=3, attn_implementation=attention)
    layers = "bert.encoder.layer."
    choice = {
        f"{layers}0.attention.self.query": ("lora", 2),
        f"{layers}1.intermediate.dense": ("lora", 4),
        f"{layers}0.output.dense": ("adapter", 3),
        f"{layers}0.attention.self": ("prefix", 2),
        f"{layers}1.attention.self": ("prefix", 5),
    }
    return Shape(BertForSequenceClassification(config).eval(), _text(labels=torch.tensor([0, 2])), choice)


def _modernbert(attention: str) -> Shape:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = ModernBertConfig(
        **_WIDE, **_COMMON, **ends, vocab_size=50, num_labels=3, local_attention=4, attn_implementation=attention
    )  # the second block's attention is local
    choice = {
        "model.layers.0.attn.Wqkv": ("lora", 2),
        "model.layers.1.mlp.Wi": ("lora", 4),
        "model.layers.0.mlp.Wo": ("adapter", 3),
        "model.layers.0.attn": ("prefix", 2),
        "model.layers.1.attn": ("prefix", 5),
    }
    return Shape(ModernBertForSequenceClassification(config).eval(), _text(labels=torch.tensor([0, 2])), choice)


def _gpt2(attention: str) -> Shape:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=64, **_WORDS, **_COMMON, attn_implementation=attention
    )
    choice = {
        "transformer.h.0.attn.c_attn": ("lora", 2),
        "transformer.h.1.mlp.c_fc": ("lora", 4),
        "transformer.h.0.mlp.c_proj": ("adapter", 3),
        "transformer.h.0.attn": ("prefix", 2),
        "transformer.h.1.attn": ("prefix", 5),
    }
    return Shape(GPT2LMHeadModel(config).eval(), _text(labels=_text()["input_ids"]), choice, generates=True)


def _llama(attention: str) -> Shape:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_WIDE, **_WORDS, **_COMMON, num_key_value_heads=2, attn_implementation=attention)
    choice = {
        "model.layers.0.self_attn.q_proj": ("lora", 2),
        "model.layers.1.self_attn.v_proj": ("lora", 4),
        "model.layers.0.mlp.down_proj": ("adapter", 3),
        "model.layers.0.self_attn": ("prefix", 2),
        "model.layers.1.self_attn": ("prefix", 5),
    }
    model = LlamaForCausalLM(config).eval()
    return Shape(model, _text(labels=_text()["input_ids"]), choice, kv_width=WIDTH // 2, generates=True)


def _t5(attention: str) -> Shape:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=WIDTH, d_ff=48, num_layers=2, num_heads=HEADS, d_kv=8, **_WORDS, decoder_start_token_id=0,
        attn_implementation=attention, tie_word_embeddings=False, initializer_factor=4.0,  # less repeats one token
        dropout_rate=0.0,
    )  # fmt: skip
    choice = {
        "encoder.block.0.layer.0.SelfAttention.q": ("lora", 2),
        "decoder.block.1.layer.2.DenseReluDense.wi": ("lora", 4),
        "decoder.block.0.layer.2.DenseReluDense.wo": ("adapter", 3),
        "encoder.block.1.layer.0.SelfAttention": ("prefix", 2),
        "decoder.block.0.layer.0.SelfAttention": ("prefix", 3),
        "decoder.block.1.layer.1.EncDecAttention": ("prefix", 5),
    }
    model = T5ForConditionalGeneration(config).eval()
    return Shape(model, _text(labels=_text()["input_ids"][:, :4].contiguous()), choice, generates=True)


def _vit(attention: str) -> Shape:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**_WIDE, **_COMMON, image_size=8, patch_size=4, num_labels=3, attn_implementation=attention)
    model = ViTForImageClassification(config).eval()
    names = [name for name, _ in model.named_modules()]
    attentions = [name for name in names if name.endswith((".0.attention", ".1.attention"))]
    dense = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inside = [name for name in dense if name.startswith(f"{attentions[0]}.")]
    down = next(name for name, module in dense.items() if module.in_features == 48)
    up = [name for name, module in dense.items() if module.out_features == 48][1]
    choice = {
        inside[0]: ("lora", 2),
        up: ("lora", 4),
        down: ("adapter", 3),
        attentions[0]: ("prefix", 2),
        attentions[1]: ("prefix", 5),
    }
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return Shape(model, {"pixel_values": pixels, "labels": torch.tensor([0, 2])}, choice)


SHAPES = {"bert": _bert, "modernbert": _modernbert, "gpt2": _gpt2, "llama": _llama, "t5": _t5, "vit": _vit}


def plan(
    model: Any, choice: Mapping[str, tuple[str, int]], *, kv_width: int = WIDTH, lora: Any = None, **model_fields: Any
) -> Manifest:
    """A manifest of ``choice``, with costs from the textbook counts of each method."""
    rows = []
    for name, (method, rank) in choice.items():
        module = model.get_submodule(name)
        if method == "lora":
            n_in, n_out, groups = lora_shape(module)
            cost = rank * (n_in + n_out // groups)
        elif method == "adapter":
            n_out = lora_shape(module)[1]
            cost = 2 * n_out * rank + rank + n_out
        else:
            cost = 2 * rank * kv_width + HEADS
        rows.append(ManifestRow(name, method, rank, 0.0, cost, 0.0, 0.0, 0.0, 0.0))
    heads = [name for name in ("classifier", "fc") if hasattr(model, name)]
    facts = {
        "name_or_path": "tiny",
        "fingerprint": weights_fingerprint(model, [f"{head}.{end}" for head in heads for end in ("weight", "bias")]),
        "total_params": sum(parameter.numel() for parameter in model.parameters()),
        "task": "",
        "head_modules": tuple(heads),
        **model_fields,
    }
    scale = LoraSettings(**{"alpha_over_r": 2.0, **(lora or {})})
    return Manifest(
        model=ModelFacts.of(facts), allocations=tuple(rows), resources=(), score=0.0, upper_bound=0.0, gap=0.0,
        status="optimal", solver="test", utility_model="uniform", utility_unit="share", lora=scale,
        provenance=Provenance(seed=7),
    )  # fmt: skip


def shake(model: Any) -> None:
    """Every trainable parameter away from its start, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def train(model: Any, inputs: dict[str, torch.Tensor], steps: int = 2) -> list[float]:
    """A few steps on one batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.002)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def assert_the_loss_falls_along_its_gradient(
    model: Any, inputs: dict[str, torch.Tensor], *, train: bool = False
) -> None:
    """A small step down the gradient g lowers the loss L, by as much as g says; the model is as before.

    L(θ - t·g) = L(θ) - t·‖g‖² + O(t²) for any loss with two derivatives. With t·‖g‖² = 2⁻¹³·L what is left of it is the
    second order, a twentieth in the steepest of these models (T5: L = 210, ‖g‖ = 903), and rounding: a float32 loss
    behind two blocks is off by some 2⁻²⁴·2⁴ of itself, a hundredth of the drop. Dropout is off unless ``train``, for
    models that have none.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    model.train(train)
    loss = model(**inputs).loss
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
    slope = sum(gradient.square().sum().item() for gradient in gradients)
    assert slope > 0.0
    size = loss.item() / slope * 2.0**-13
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.sub_(size * gradient)
        fell = loss.item() - model(**inputs).loss.item()
        for parameter, value in zip(trained, start, strict=True):
            parameter.copy_(value)
    model.eval()
    assert abs(fell / (size * slope) - 1.0) < 0.1
