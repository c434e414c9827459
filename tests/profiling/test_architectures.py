"""Statistics of every weight of every listed architecture equal brute-force autograd, and cover 99 % of the parameters.

The models are float64: both routes round at 2^-53 and sum some thousand products, so 1e-9 leaves four decimal digits.
The models are small, so coverage is computed for the real sizes on the meta device, where nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from brute_force import assert_equal, pieces, profile, sample_gradients, weight_statistics

from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.transformers import blocks_of
from layerlens.integrations.weight_matrices import measurable_modules
from layerlens.models import ModelSpec
from layerlens.tasks.batches import Batch
from layerlens.tasks.losses import (
    IGNORED,
    Loss,
    causal_loss,
    classification_loss,
    own_loss,
    regression_loss,
    span_loss,
    token_loss,
)

RELATIVE = 1e-9
N, T, VOCABULARY, CLASSES = 5, 6, 40, 3
SMALL = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "pad_token_id": 0}
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


class ConvNet(torch.nn.Module):
    """Plain, strided, dilated, grouped and depthwise convolutions, and a Linear at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1, stride=2), torch.nn.GELU(),
            torch.nn.Conv2d(8, 12, 3, padding=(2, 1), dilation=(2, 1), groups=4, bias=False), torch.nn.GELU(),
            torch.nn.Conv2d(12, 12, (3, 2), groups=12), torch.nn.GELU(),
        )  # fmt: skip
        self.head = torch.nn.Linear(12, CLASSES)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pixel_values).mean(dim=(2, 3)))


def modernbert(**fields: Any) -> hf.ModernBertConfig:
    """Its first block sees all tokens, its second 2 around each."""
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return hf.ModernBertConfig(vocab_size=VOCABULARY, **ends, local_attention=4, **fields)


def tokens(*, padding: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (N, T), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        for row in range(1, N):
            mask[row, T - row % 4 :] = 0 if row % 4 else 1
        ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask}


def classes() -> torch.Tensor:
    return torch.arange(N) % CLASSES


def token_labels(inputs: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    labels = torch.randint(0, count, (N, T), generator=torch.Generator().manual_seed(4))
    return torch.where(inputs["attention_mask"].bool(), labels, torch.full_like(labels, IGNORED))


def images() -> torch.Tensor:
    return torch.randn(N, 3, 12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    make: Callable[[], torch.nn.Module]
    batch: Callable[[], Batch]
    loss: Loss


def text(labels: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> Callable[[], Batch]:
    def batch() -> Batch:
        inputs = tokens()
        return Batch(inputs, labels(inputs), torch.arange(N))

    return batch


def seq2seq() -> Batch:
    inputs = tokens()
    decoder = torch.randint(1, VOCABULARY, (N, T + 1), generator=torch.Generator().manual_seed(6))
    labels = torch.roll(decoder, -1, dims=1)
    labels[:, -1] = IGNORED
    return Batch(inputs | {"decoder_input_ids": decoder}, labels, torch.arange(N))


def questions() -> Batch:
    """Answers between the first token and the padding."""
    inputs = tokens()
    lengths = inputs["attention_mask"].sum(dim=1)
    spans = torch.stack([torch.arange(N) % 2, lengths - 1], dim=1)
    return Batch(inputs, spans, torch.arange(N))


class OwnModel(torch.nn.Module):
    """Two inputs, an output that is a mapping, a weight that is used twice, and a loss that only its owner knows."""

    def __init__(self) -> None:
        super().__init__()
        self.look_up = torch.nn.Embedding(VOCABULARY, 8)
        self.shared = torch.nn.Linear(8, 8)
        self.out = torch.nn.Linear(8, 2)

    def forward(self, ids: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.shared(torch.tanh(self.shared(self.look_up(ids)))))
        return {"place": self.out(hidden.mean(dim=1)) + shift, "hidden": hidden}


def own_batch() -> Batch:
    targets = {"place": torch.randn(N, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)}
    shift = torch.randn(N, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return Batch({"ids": tokens(padding=False)["input_ids"], "shift": shift}, targets["place"], torch.arange(N))


def own(output: dict[str, torch.Tensor], place: torch.Tensor) -> torch.Tensor:
    """A robust distance, and a penalty on what is inside."""
    distance = torch.nn.functional.huber_loss(output["place"], place, reduction="none").sum(dim=1)
    return distance + 0.1 * output["hidden"].square().mean(dim=(1, 2))


def token_mean(output: object, batch: Batch) -> torch.Tensor:
    """Reduction "mean" as a sample has it alone: over its own labelled tokens."""
    return token_loss(output, batch) / (batch.labels != IGNORED).sum(dim=1)


def pictures() -> Batch:
    return Batch({"pixel_values": images()}, classes(), torch.arange(N))


def lm_labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)


CASES = {
    "bert-classification": Case(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **WIDTHS, num_labels=CLASSES)),
        text(lambda inputs: classes()), classification_loss,
    ),
    "bert-tokens": Case(
        lambda: hf.BertForTokenClassification(hf.BertConfig(**SMALL, **WIDTHS, num_labels=CLASSES)),
        text(lambda inputs: token_labels(inputs, CLASSES)), token_loss,
    ),
    "bert-tokens-mean": Case(  # the reduction of the case above is the sum
        lambda: hf.BertForTokenClassification(hf.BertConfig(**SMALL, **WIDTHS, num_labels=CLASSES)),
        text(lambda inputs: token_labels(inputs, CLASSES)), token_mean,
    ),
    "bert-tokens-smoothed": Case(
        lambda: hf.BertForTokenClassification(hf.BertConfig(**SMALL, **WIDTHS, num_labels=CLASSES)),
        text(lambda inputs: token_labels(inputs, CLASSES)), partial(token_loss, label_smoothing=0.1),
    ),
    "bert-questions": Case(
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SMALL, **WIDTHS)), questions, span_loss
    ),
    "roberta-questions": Case(
        lambda: hf.RobertaForQuestionAnswering(
            hf.RobertaConfig(**SMALL | {"pad_token_id": 1}, **WIDTHS, max_position_embeddings=32)
        ),
        questions, span_loss,
    ),
    "own-loss": Case(OwnModel, own_batch, own_loss(own, "own")),
    "bert-masked-lm-tied": Case(
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, **WIDTHS)),
        text(lambda inputs: token_labels(inputs, VOCABULARY)), token_loss,
    ),
    "modernbert-masked-lm-tied": Case(
        lambda: hf.ModernBertForMaskedLM(modernbert(**WIDTHS, initializer_range=0.3)),
        text(lambda inputs: token_labels(inputs, VOCABULARY)), token_loss,
    ),
    "roberta-regression": Case(
        lambda: hf.RobertaForSequenceClassification(
            hf.RobertaConfig(**SMALL, **WIDTHS, num_labels=1, max_position_embeddings=32)
        ),
        text(lambda inputs: torch.linspace(-1, 1, N, dtype=torch.float64)), regression_loss,
    ),
    "gpt2-causal-tied": Case(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
        ),
        text(lm_labels), causal_loss,
    ),
    "llama-causal-gqa": Case(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **WIDTHS, num_key_value_heads=2)),
        text(lm_labels), causal_loss,
    ),
    "qwen3-causal-tied": Case(
        lambda: hf.Qwen3ForCausalLM(
            hf.Qwen3Config(**SMALL, **WIDTHS, num_key_value_heads=2, head_dim=4, tie_word_embeddings=True)
        ),
        text(lm_labels), causal_loss,
    ),
    "t5-seq2seq": Case(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, pad_token_id=0)
        ),
        seq2seq, token_loss,
    ),
    "vit": Case(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**WIDTHS, image_size=12, patch_size=4, num_labels=CLASSES, initializer_range=0.3)
        ),
        pictures, classification_loss,
    ),
    "convnet": Case(ConvNet, pictures, classification_loss),
}  # fmt: skip


def spec_of(model: torch.nn.Module) -> ModelSpec:
    if not blocks_of(model):
        return ModelSpec("test", sum(parameter.numel() for parameter in model.parameters()))
    return model_spec(PretrainedModel(model, None, "", ()), "test")


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_every_weight_equals_one_backward_per_sample(case: Case):
    torch.manual_seed(1)
    model = case.make().double().eval()
    batch = case.batch()
    gradients = sample_gradients(model, batch, case.loss)
    # Batches of uneven size, one of a single sample; in the case of position embeddings a batch axis of 1 everywhere.
    statistics = profile(model, spec_of(model), pieces(batch, 1, 3, 1), case.loss)
    assert_equal(statistics, gradients, RELATIVE)
    assert len(weight_statistics(statistics)) >= 3
    assert not any("not requested" in reason for reason in statistics.left_out.values()), statistics.left_out


REAL_SIZES = {
    "bert-base": lambda: hf.BertForSequenceClassification(hf.BertConfig()),
    "minilm-l6": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    ),
    "modernbert-base": lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig()),
    "roberta-base": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(vocab_size=50265)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config()),
    "llama-7b": lambda: hf.LlamaForCausalLM(hf.LlamaConfig()),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config()),
    "t5-small": lambda: hf.T5ForConditionalGeneration(hf.T5Config()),
    "vit-base": lambda: hf.ViTForImageClassification(hf.ViTConfig()),
    "resnet-50": lambda: hf.ResNetForImageClassification(hf.ResNetConfig()),
    "convnext-tiny": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig()),
}


@pytest.mark.parametrize("name", list(REAL_SIZES))
def test_ninety_nine_percent_of_the_parameters_can_be_measured(name: str):
    with torch.device("meta"):
        model = REAL_SIZES[name]()
    weights = {
        id(x): x for path in measurable_modules(model, ModelSpec("", 0)) for x in [model.get_submodule(path).weight]
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(weight.numel() for weight in weights.values()) >= 0.99 * total
