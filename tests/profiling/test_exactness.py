"""Every statistic equals brute-force autograd: one backward pass per sample, in float64, by another route.

The models are float64, so both routes round at 2^-53 and sum a few thousand products; 1e-9 relative leaves four decimal
digits for the accumulated rounding and for cancellation in the differences of ``signal``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from layerlens.exceptions import ProfilingError
from layerlens.integrations.attention import attention_outputs
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import ModelSpec
from layerlens.profiling.measure import measure
from layerlens.profiling.request import StatisticsRequest
from layerlens.tasks.batches import Batch
from layerlens.utils.progress import silent

RELATIVE = 1e-9
SIGNAL = ("fisher", "gradient", "input_scale")
N_SAMPLES, VOCABULARY, CLASSES = 7, 50, 3
PAD = 0


def bert() -> torch.nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        num_labels=CLASSES,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config)


def gpt2() -> torch.nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=32,
        num_labels=CLASSES,
        pad_token_id=PAD,
        initializer_range=0.3,
    )
    return GPT2ForSequenceClassification(config)


def llama() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        num_labels=CLASSES,
        pad_token_id=PAD,
        initializer_range=0.3,
    )
    return LlamaForSequenceClassification(config)


@pytest.fixture(params=[bert, gpt2, llama], ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(1)
    return request.param().double().eval().requires_grad_(False)


def samples() -> list[Batch]:
    """Single samples of different lengths, without padding."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for index in range(N_SAMPLES):
        ids = torch.randint(1, VOCABULARY, (1, 3 + index % 4), generator=generator)
        label = torch.randint(0, CLASSES, (1,), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batches.append(Batch(inputs, label, torch.tensor([index])))
    return batches


def joined(batches: list[Batch]) -> Batch:
    """One padded batch of several single samples."""
    length = max(batch.mask.shape[1] for batch in batches)

    def pad(key: str) -> torch.Tensor:
        return torch.cat(
            [torch.nn.functional.pad(batch.inputs[key], (0, length - batch.mask.shape[1])) for batch in batches]
        )

    return Batch(
        {"input_ids": pad("input_ids"), "attention_mask": pad("attention_mask")},
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.index for batch in batches]),
    )


def spec_of(model: torch.nn.Module) -> ModelSpec:
    return model_spec(PretrainedModel(model, None, "", ()), "test", adapter_sites="all")


def profile(model: torch.nn.Module, batches: list[Batch], *, statistics: tuple[str, ...] = SIGNAL, threads: int = 1):
    return measure(
        model,
        spec_of(model),
        batches,
        request=StatisticsRequest.of(statistics),
        sequence_length=8,
        threads=threads,
        progress=silent,
    )


def brute_force(model: torch.nn.Module) -> Iterator[dict[tuple[str, str], np.ndarray]]:
    """M_n of every (layer, method), one sample after the other, from retained gradients of module outputs."""
    spec = spec_of(model)
    dense = {layer.name: model.get_submodule(layer.name) for layer in spec.layers if layer.layer_type == "linear"}
    attention = {id(model.get_submodule(x.name)): x.name for x in spec.layers if x.layer_type == "attention"}
    model.requires_grad_(True)
    for batch in samples():
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        contexts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(module, args, output, seen=seen):
            name = next(name for name, candidate in dense.items() if candidate is module)
            output.retain_grad()
            seen[name] = (args[0], output)

        def keep_context(module, query, output, contexts=contexts):
            output.retain_grad()
            contexts[attention[id(module)]] = (query, output)
            return output

        handles = [module.register_forward_hook(keep) for module in dense.values()]
        with attention_outputs(model, keep_context):
            logits = model(**batch.inputs).logits
            torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        for handle in handles:
            handle.remove()
        matrices = {}
        for layer in spec.layers:
            if layer.layer_type == "linear":
                h, y = seen[layer.name]
                weight = model.get_submodule(layer.name).weight
                gradient = weight.grad if hasattr(model.get_submodule(layer.name), "in_features") else weight.grad.T
                matrices[layer.name, "lora"] = gradient.numpy().copy()
                matrices[layer.name, "adapter"] = np.einsum("to,ti->oi", y.grad[0].numpy(), y[0].detach().numpy())
                assert h.shape[1] == batch.mask.shape[1]
            else:
                query, output = contexts[layer.name]
                q = query[0].detach().numpy() / np.sqrt(query.shape[-1])
                psi = np.concatenate([np.ones((*q.shape[:2], 1)), q], axis=-1)
                matrices[layer.name, "prefix"] = np.einsum("tho,hti->hoi", output.grad[0].numpy(), psi)
        model.zero_grad()
        yield matrices
    model.requires_grad_(False)


def test_energy_trace_and_signal_equal_one_backward_per_sample(model):
    matrices = list(brute_force(model))
    measured = profile(model, [joined(samples()[:4]), joined(samples()[4:])]).by_name()
    for (layer, method), _ in matrices[0].items():
        each = np.stack([sample[layer, method].ravel() for sample in matrices])
        energy, trace = np.sum(each.mean(axis=0) ** 2), np.mean(np.sum(each**2, axis=1))
        got = measured[layer].by_method[method]
        assert got.energy == pytest.approx(energy, rel=RELATIVE)
        assert got.trace == pytest.approx(trace, rel=RELATIVE)
        # The unbiased estimate is the mean of <M_n, M_m> over pairs n != m.
        gram = each @ each.T
        pairs = (gram.sum() - np.trace(gram)) / (N_SAMPLES * (N_SAMPLES - 1))
        assert got.signal == pytest.approx(pairs, rel=RELATIVE, abs=RELATIVE * trace)


def test_every_linear_of_every_block_and_every_attention_is_measured(model):
    names = {layer.name for layer in spec_of(model).layers}
    blocks = [name for name, _ in model.named_modules() if name.endswith((".layer.0", ".h.0", ".layers.0"))]
    inside = [
        name
        for name, module in model.named_modules()
        if any(name.startswith(block + ".") for block in blocks)
        and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    ]
    assert len(inside) >= 4
    assert set(inside) <= names
    assert sum(layer.layer_type == "attention" for layer in spec_of(model).layers) == 2


def test_batch_size_and_threads_do_not_change_the_result(model):
    alone = profile(model, samples(), statistics=(*SIGNAL, "whitened_spectrum"))
    together = profile(model, [joined(samples())], statistics=(*SIGNAL, "whitened_spectrum"), threads=2)
    for one, other in zip(alone.layers, together.layers, strict=True):
        for method, measured in one.by_method.items():
            again = other.by_method[method]
            for name in ("energy", "trace", "signal", "input_mean_square"):
                scale = measured.trace if name == "signal" else 0.0
                assert getattr(again, name) == pytest.approx(
                    getattr(measured, name), rel=RELATIVE, abs=RELATIVE * scale
                )
            # Singular vectors of near-equal values may turn into each other, so the sum is what is well defined.
            total = np.abs(measured.spectrum).sum()
            assert again.spectrum.sum() == pytest.approx(measured.spectrum.sum(), abs=1e-6 * total)
    assert together.mean_loss == pytest.approx(alone.mean_loss, rel=RELATIVE)
    assert together.n_tokens == alone.n_tokens == sum(int(batch.mask.sum()) for batch in samples())


def test_the_model_is_left_as_it_was():
    torch.manual_seed(1)
    model = bert().eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(**joined(samples()).inputs).logits
    profile(model, [joined(samples())])
    assert torch.equal(model(**joined(samples()).inputs).logits, logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_nan_weights_are_refused_by_sample():
    model = bert().eval().requires_grad_(False)
    model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ProfilingError, match="the loss of calibration sample 0 is nan"):
        profile(model, [joined(samples())])


def test_a_layer_that_the_loss_does_not_reach_is_left_out_by_name():
    model = bert().eval().requires_grad_(False)
    spec = spec_of(model)
    cut = model.bert.encoder.layer[1]
    original = cut.forward
    cut.forward = lambda hidden, *args, **kwargs: original(hidden.detach(), *args, **kwargs)
    statistics = measure(
        model,
        spec,
        [joined(samples())],
        request=StatisticsRequest.of(SIGNAL),
        sequence_length=8,
        threads=1,
        progress=silent,
    )
    unreached = [layer.name for layer in spec.layers if ".layer.0." in layer.name]
    assert list(statistics.unmeasured) == unreached
    assert all("no gradient reaches it" in reason for reason in statistics.unmeasured.values())
    left = spec.without(statistics.unmeasured)
    assert [layer.name for layer in left.layers] == [layer.layer for layer in statistics.layers]
    assert left.left_out == statistics.unmeasured
