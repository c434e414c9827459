"""A loss of whole batches: gradients are those of the mean over batches, whatever the model is called with in it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from layerlens.exceptions import ConfigurationError, ProfilingError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import LORA, LayerStatistics, ModelStatistics
from layerlens.profiling.coupling import of_batches
from layerlens.profiling.measure import measure
from layerlens.profiling.request import StatisticsRequest
from layerlens.registry import TASKS
from layerlens.tasks import Batch
from layerlens.tasks.losses import BatchLoss
from layerlens.utils.progress import silent

ROUNDING = 1e-9
"""float64 products over at most 10⁴ terms, 2⁻⁵³ each, relative to sums that hardly cancel: 1e-12; a thousandfold."""


@pytest.fixture
def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config).double().eval().requires_grad_(False)


def pairs(n_batches: int, n: int = 3) -> list[Batch]:
    """Batches of pairs of texts of one length, whose padding differs."""
    found = []
    for number in range(n_batches):
        inputs = {}
        for side in ("one", "other"):
            mask = (torch.arange(6)[None] < torch.randint(2, 7, (n, 1))).long()
            inputs |= {f"{side}_ids": torch.randint(1, 50, (n, 6)), f"{side}_mask": mask}
        found.append(Batch(inputs, None, torch.tensor([number])))
    return found


def contrastive(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """In-batch negatives, as sentence encoders are trained: the model is called twice, and samples are compared."""
    pooled = []
    for side in ("one", "other"):
        mask = batch.inputs[f"{side}_mask"]
        states = model(input_ids=batch.inputs[f"{side}_ids"], attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        pooled.append((states * weights).sum(1) / weights.sum(1))
    scores = pooled[0] @ pooled[1].T
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def measured(
    model: torch.nn.Module, batches: list[Batch], loss: Callable[..., torch.Tensor], *names: str
) -> ModelStatistics:
    inputs = {"input_ids": batches[0].inputs["one_ids"], "attention_mask": batches[0].inputs["one_mask"]}
    return measure(
        model, model_spec(PretrainedModel(model, None, "tiny", ()), "tiny"), batches,
        request=StatisticsRequest.of(names), sequence_length=6, threads=1, progress=silent,
        loss=BatchLoss(loss, "this loss"), example=inputs,
    )  # fmt: skip


def with_lora(found: ModelStatistics) -> list[LayerStatistics]:
    layers = [layer for layer in found.layers if LORA in layer.by_method]
    assert len(layers) == 12
    return layers


def batch_gradients(
    model: torch.nn.Module, batches: list[Batch], loss: Callable[..., torch.Tensor]
) -> dict[str, np.ndarray]:
    """Weight -> gradient of each batch's loss by autograd, [batches, out, in]."""
    weights = {name: x for name, x in model.named_parameters() if x.dim() == 2}
    for weight in weights.values():
        weight.requires_grad_(True)
    rows = [torch.autograd.grad(loss(model, one), list(weights.values()), allow_unused=True) for one in batches]
    model.requires_grad_(False)
    return {
        name: torch.stack([row[k] if row[k] is not None else torch.zeros_like(weights[name]) for row in rows]).numpy()
        for k, name in enumerate(weights)
    }


def test_energies_are_of_the_mean_over_batches(encoder: torch.nn.Module):
    batches = pairs(5)
    found = measured(encoder, batches, contrastive, "gradient", "input_scale", "spectrum")
    truth = batch_gradients(encoder, batches, contrastive)
    assert found.n_samples == len(batches)
    for layer in with_lora(found):
        gradients, own = truth[f"{layer.layer}.weight"], layer.by_method[LORA]
        assert own.energy == pytest.approx((gradients.mean(0) ** 2).sum(), rel=ROUNDING)
        halves = gradients[0::2].mean(0), gradients[1::2].mean(0)
        left, values, right = np.linalg.svd(halves[0], full_matrices=False)
        one = values * np.einsum("oi,oi->i", left, halves[1] @ right.T)
        assert own.plain_spectrum is not None
        left, values, right = np.linalg.svd(halves[1], full_matrices=False)
        other = values * np.einsum("oi,oi->i", left, halves[0] @ right.T)
        np.testing.assert_allclose(own.plain_spectrum, np.sort((one + other) / 2)[::-1], rtol=1e-6, atol=1e-12)


def test_padding_of_each_call_is_left_out_of_the_inputs(encoder: torch.nn.Module):
    """The two calls of a batch have one shape and different masks."""
    batches = pairs(3)
    found = measured(encoder, batches, contrastive, "input_scale").by_name()
    squares, count = 0.0, 0
    query = encoder.get_submodule("encoder.layer.0.attention.self.query")
    masks = [batch.inputs[f"{side}_mask"] for batch in batches for side in ("one", "other")]
    seen: list[torch.Tensor] = []
    handle = query.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for batch in batches:
        contrastive(encoder, batch)
    handle.remove()
    for mask, z in zip(masks, seen, strict=True):
        squares += float((z * mask[..., None]).square().sum())
        count += int(mask.sum()) * z.shape[-1]
    own = found["encoder.layer.0.attention.self.query"].by_method[LORA].input_mean_square
    assert own == pytest.approx(squares / count, rel=ROUNDING)


def test_what_the_loss_does_not_use_is_told_apart_from_what_it_does(encoder: torch.nn.Module):
    """One of two calls has no part in the loss."""

    def half_used(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        model(input_ids=batch.inputs["other_ids"], attention_mask=batch.inputs["other_mask"])
        states = model(input_ids=batch.inputs["one_ids"], attention_mask=batch.inputs["one_mask"]).last_hidden_state
        return states[:, 0].square().mean()

    batches = pairs(2)
    found = measured(encoder, batches, half_used, "gradient")
    truth = batch_gradients(encoder, batches, half_used)
    for layer in with_lora(found):
        expected = (truth[f"{layer.layer}.weight"].mean(0) ** 2).sum()
        assert layer.by_method[LORA].energy == pytest.approx(expected, rel=ROUNDING)


def test_statistics_of_single_samples_are_refused_by_name(encoder: torch.nn.Module):
    with pytest.raises(
        ConfigurationError, match="fisher, ntk need the loss of each sample, and this loss is one number"
    ):
        measured(encoder, pairs(2), contrastive, "ntk", "gradient", "fisher")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: contrastive(model, batch).detach(), "has no gradient"),
        (lambda model, batch: contrastive(model, batch) * float("nan"), "calibration batch 0 is nan"),
        (lambda model, batch: torch.ones(3), r"one number for a batch, got a tensor \[3\]"),
        (lambda model, batch: 0.5, "one number for a batch, got float"),
    ],
    ids=["detached", "nan", "a tensor", "no tensor"],
)
def test_a_loss_that_is_none_is_refused(encoder: torch.nn.Module, loss: Callable[..., torch.Tensor], message: str):
    with pytest.raises(ProfilingError, match=message):
        measured(encoder, pairs(2), loss, "gradient")


def test_two_towers_whose_samples_are_compared():
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**widths, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49},
        vision_config={**widths, "image_size": 8, "patch_size": 4}, projection_dim=8,
    )  # fmt: skip
    model = CLIPModel(config).double().eval().requires_grad_(False)
    loss = TASKS["image-text-pairs"].loss
    batches = []
    for number in range(3):
        mask = (torch.arange(7)[None] < torch.randint(3, 8, (4, 1))).long()
        ids = torch.randint(1, 49, (4, 7)).scatter(1, mask.sum(1, keepdim=True) - 1, 49)
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(4, 3, 8, 8).double()}
        batches.append(Batch(inputs, None, torch.tensor([number])))
    spec = model_spec(PretrainedModel(model, None, "tiny", ()), "tiny", inputs=batches[0].inputs)
    found = measure(
        model, spec, batches, request=StatisticsRequest.of(["gradient"]), sequence_length=6, threads=1, progress=silent,
        loss=of_batches(loss, "the loss"),
    )  # fmt: skip
    gradients = batch_gradients(model, batches, lambda model, batch: loss(model(**batch.inputs), batch).mean())
    layers = [layer for layer in found.layers if LORA in layer.by_method]
    assert {layer.layer.partition(".")[0] for layer in layers} == {"text_model", "vision_model"}
    assert len(layers) == 12
    for layer in layers:
        expected = np.square(gradients[f"{layer.layer}.weight"].mean(axis=0)).sum()
        assert layer.by_method[LORA].energy == pytest.approx(expected, rel=ROUNDING), layer.layer
