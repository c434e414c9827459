"""Samples that are not the leading axis of what a layer sees: found, and held against one backward pass per sample.

The models are float64: both routes round at 2^-53 and sum some thousand products, so 1e-9 leaves four decimal digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from brute_force import assert_equal, pieces, profile, sample_gradients, weight_statistics
from torch import nn

from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import LayerSpec, ModelSpec, ModelStatistics
from layerlens.profiling.layouts import Layout, counted_layout, exchanged_layout, rows_of
from layerlens.tasks.batches import Batch
from layerlens.tasks.losses import classification_loss

N = 5


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(**inputs: torch.Tensor) -> Batch:
    return Batch(inputs, torch.arange(N) % 3, torch.arange(N))


def frozen(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 0.1:
                parameter.normal_(0, 0.3)
    return model.requires_grad_(False)


def right(model: nn.Module, batch: Batch, sizes: Sequence[int] = (3, 2), **options: Any) -> ModelStatistics:
    """The statistics, the same in batches of other sizes, and equal to those of one backward pass per sample."""
    spec = model_spec(PretrainedModel(model, None, "", ()), "test", inputs=batch.inputs)
    found = profile(model, spec, [batch], classification_loss, **options)
    assert_equal(found, sample_gradients(model, batch, classification_loss), 1e-9)
    again = weight_statistics(profile(model, spec, pieces(batch, *sizes), classification_loss, **options))
    for name, one in weight_statistics(found).items():
        assert again[name].trace == pytest.approx(one.trace, rel=1e-9), name
    return found


class TokensFirst(nn.Module):
    """PyTorch's own transformer with its default, [tokens, samples, features]: as many tokens as samples, the trap."""

    def __init__(self, tokens: int, batch_first: bool) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.places = nn.Parameter(torch.randn(tokens, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).transpose(0, 1) + self.places
        in_front = self.encoder.layers[0].self_attn.batch_first
        return self.head(self.encoder(h.transpose(0, 1)).mean(1) if in_front else self.encoder(h).mean(0))


@pytest.mark.parametrize(("tokens", "batch_first"), [(2, False), (N, False), (7, False), (7, True)])
def test_tokens_before_samples(tokens: int, batch_first: bool):
    model = frozen(lambda: TokensFirst(tokens, batch_first))  # with samples in front, also beside torch's fused path
    found = right(model, batch_of(x=random(N, tokens, 4)))
    assert "encoder.layers.1.linear2" in found.by_name()
    assert all("in_proj" in name or "self_attn" in name for name in found.unmeasured)


class Decoder(nn.Module):
    """Learned queries, the same for all samples, and a table of places that is read once: DETR's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.places = nn.Embedding(4, 8), nn.Embedding(6, 8)
        self.image, self.query, self.out, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = self.image(x).transpose(0, 1) + self.places(torch.arange(6))[:, None]
        asked = self.query(self.queries.weight[:, None].expand(-1, len(x), -1))
        scores = torch.einsum("qbk,tbk->bqt", asked, memory).softmax(-1)
        return self.head(self.out(torch.einsum("bqt,tbk->qbk", scores, memory)).tanh().mean(0))


def test_what_is_the_same_for_all_samples_is_counted_with_a_third():
    model = frozen(Decoder)
    found = right(model, batch_of(x=random(N, 6, 4)))
    assert "query" in found.by_name()
    assert "called once for all samples" in found.left_out["places.weight"]


def windows(model: Any, h: torch.Tensor) -> torch.Tensor:
    """[b, 4, 4, k] as [b · windows, tokens, k], and back."""
    b = len(h)
    cut = h.view(b, 2, 2, 2, 2, -1).transpose(2, 3).reshape(b * 4, 4, -1)
    return model.inner(cut).view(b, 2, 2, 2, 2, -1).transpose(2, 3).reshape(b, 16, -1)


def places_first(model: Any, h: torch.Tensor) -> torch.Tensor:
    """[places · samples, k]."""
    return model.inner(h.flatten(1, 2).transpose(0, 1).reshape(-1, 4)).unflatten(0, (16, -1)).transpose(0, 1)


def frames(model: Any, h: torch.Tensor) -> torch.Tensor:
    """A convolution that sees the frames of all samples as images, [samples · frames, channels, w]."""
    b = len(h)
    return model.conv(h.reshape(b * 4, 4, 4).mT).mT.reshape(b, 16, -1)


def packed(model: Any, h: torch.Tensor) -> torch.Tensor:
    """All tokens of a batch as one sequence, [1, samples · tokens, k]."""
    return model.inner(h.reshape(1, -1, 4)).view(len(h), 16, -1)


class Cut(nn.Module):
    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.outer, self.inner, self.conv = nn.Linear(3, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.head, self.between = nn.Linear(4, 3), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self, torch.tanh(self.outer(x))).tanh().mean(dim=1))


@pytest.mark.parametrize("between", [windows, places_first, frames, packed])
def test_windows_places_frames_and_packed_tokens(between: Callable[..., torch.Tensor]):
    model = frozen(lambda: Cut(between))
    found = right(model, batch_of(x=random(N, 4, 4, 3)))
    assert ("conv" if between is frames else "inner") in found.by_name()


def sorted_tokens(model: Any, h: torch.Tensor) -> torch.Tensor:
    flat = h.flatten(0, 2)
    order = flat.sum(-1).argsort()
    return model.inner(flat[order])[order.argsort()].view(len(h), 16, -1)


def sorted_samples(model: Any, h: torch.Tensor) -> torch.Tensor:
    order = h.sum((1, 2, 3)).argsort()
    return model.inner(h[order])[order.argsort()].flatten(1, 2)


@pytest.mark.parametrize("between", [sorted_tokens, sorted_samples])
def test_rows_that_are_where_their_values_put_them_are_left_out(between: Callable[..., torch.Tensor]):
    model, batch = frozen(lambda: Cut(between)), batch_of(x=random(N, 4, 4, 3))
    layers = [LayerSpec(name, 4, "linear", methods=("lora",)) for name in ("outer", "inner")]
    found = profile(model, ModelSpec("", 0, layers), [batch], classification_loss, everything=False)
    assert "cannot be traced to samples" in found.unmeasured["inner"]
    assert_equal(found, sample_gradients(model, batch, classification_loss), 1e-9)


def test_models_that_draw_numbers_have_their_samples_where_a_third_adds_to():
    def noisy(model: Any, h: torch.Tensor) -> torch.Tensor:
        return model.inner((h + torch.rand_like(h)).flatten(1, 2).transpose(0, 1)).transpose(0, 1)

    model, batch = frozen(lambda: Cut(noisy)), batch_of(x=random(N, 4, 4, 3))
    layers = [LayerSpec(name, 4, "linear", methods=("lora",)) for name in ("outer", "inner")]
    spec, request = ModelSpec("", 0, layers), {"everything": False}
    assert not profile(model, spec, [batch], classification_loss, **request).unmeasured


def swin() -> nn.Module:
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=2, num_labels=3
    )
    return hf.SwinForImageClassification(config)


def timm_swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=16, patch_size=2, window_size=2, embed_dim=8, depths=(1, 2), num_heads=(2, 2), num_classes=3
    )


@pytest.mark.parametrize("make", [swin, timm_swin])
def test_swin(make: Callable[[], nn.Module]):
    model = frozen(make)
    name = "pixel_values" if make is swin else "x"
    found = right(model, batch_of(**{name: random(N, 3, 16, 16)}))
    assert any(layer.layer.endswith(("q_proj", "qkv")) for layer in found.layers)
    assert not found.unmeasured


def test_prefixes_of_windows_count_the_sample_and_not_the_window():
    model, batch = frozen(swin), batch_of(pixel_values=random(N, 3, 16, 16))
    spec = model_spec(PretrainedModel(model, None, "", ()), "test", inputs=batch.inputs)
    together, alone = (
        profile(model, spec, cut, classification_loss, everything=False) for cut in ([batch], pieces(batch, *[1] * N))
    )
    prefixes = [layer.layer for layer in together.layers if "prefix" in layer.by_method]
    assert prefixes
    for name in prefixes:
        one, other = (found.by_name()[name].by_method["prefix"] for found in (together, alone))
        assert one.trace == pytest.approx(other.trace, rel=1e-9), name
        assert one.signal == pytest.approx(other.signal, rel=1e-9, abs=1e-9 * other.trace), name


def test_layouts_that_look_alike_are_none():
    rows = rows_of(random(2, 2, 3), -1)
    assert exchanged_layout([rows], [rows.flip(0)]) == Layout(0)
    assert exchanged_layout([rows], [rows.flip(1)]) == Layout(1)
    assert exchanged_layout([rows], [rows.flip(0, 1)]) is None
    assert exchanged_layout([rows], [rows]) is None
    flat = rows_of(random(6, 3), -1)
    assert exchanged_layout([flat], [flat.unflatten(0, (2, 3)).flip(0).flatten(0, 1)]) == Layout(0)
    assert exchanged_layout([flat], [flat.unflatten(0, (3, 2)).flip(1).flatten(0, 1)]) == Layout(0, minor=True)
    faint = 1e-23 * flat  # whose squares are 0 in float32, as in deep models with small random weights
    assert exchanged_layout([faint], [faint.unflatten(0, (2, 3)).flip(0).flatten(0, 1)]) == Layout(0)
    alike = flat[:1].expand(6, 2)
    assert exchanged_layout([alike], [2 * alike]) is None
    assert counted_layout([(7, 2)], [(7, 3)], 2) == Layout(1)
    assert counted_layout([(2, 2)], [(3, 3)], 2) is None
    assert counted_layout([(8, 4)], [(12, 4)], 2) is None
