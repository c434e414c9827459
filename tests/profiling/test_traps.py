"""Where per-sample statistics usually go wrong, each held against brute-force autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf
from brute_force import SIGNAL, assert_equal, pieces, profile, sample_gradients, singles, weight_statistics
from test_architectures import CASES, RELATIVE, spec_of

from layerlens.exceptions import ProfilingError
from layerlens.integrations.weight_matrices import measurable_modules
from layerlens.models import ModelSpec
from layerlens.profiling.capture import Capture
from layerlens.profiling.request import StatisticsRequest
from layerlens.tasks.batches import Batch
from layerlens.tasks.losses import classification_loss

BERT, GPT2 = CASES["bert-classification"], CASES["gpt2-causal-tied"]


def bert(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(1)
    return BERT.make().to(dtype).eval()


def test_modules_called_twice_sum_over_calls_before_the_square():
    model = bert()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    batch = BERT.batch()
    gradients = sample_gradients(model, batch, classification_loss)
    spec = spec_of(model)
    layers = {layer.name: layer for layer in spec.layers}  # the same block stands twice in the list of blocks
    spec = replace(spec, layers=[layer for layer in layers.values() if "layer.0" in layer.name])
    assert_equal(profile(model, spec, pieces(batch, 2, 3), classification_loss), gradients, RELATIVE)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_and_keeps_dropout_off(reentrant: bool, everything: bool):
    model, batch = bert(), BERT.batch()
    spec, plain = spec_of(model), pieces(batch, 3, 2)
    expected = profile(model, spec, plain, classification_loss, everything=everything)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    calls = []
    handle = model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *call: calls.append(1))
    checkpointed = profile(model, spec, plain, classification_loss, everything=everything)
    handle.remove()
    # Again inside each backward pass; once each for memory and FLOPs; before on two samples, and on these exchanged.
    # Where all weights are measured, with a third sample, since token types are the same for all, and with taps, since
    # rows of positions are expanded to the batch. Once because the hook that counts could change what goes through.
    assert len(calls) == 2 * len(plain) + 2 + (4 if everything else 2) + 1
    assert model.training
    assert model.bert.encoder.layer[0].training
    for name, found in weight_statistics(expected).items():
        again = weight_statistics(checkpointed)[name]
        assert again.energy == pytest.approx(found.energy, rel=RELATIVE), name
        assert again.trace == pytest.approx(found.trace, rel=RELATIVE), name
        if found.input_mean_square is not None:  # what is looked up has no inputs
            assert again.input_mean_square == pytest.approx(found.input_mean_square, rel=RELATIVE), name


@pytest.mark.parametrize("prepare", [torch.nn.Module.train, lambda model: model.bert.embeddings.requires_grad_(False)])
def test_training_mode_and_frozen_parts_change_nothing_and_come_back(prepare: Callable[[torch.nn.Module], object]):
    model, batch = bert(), BERT.batch()
    gradients = sample_gradients(model, batch, classification_loss)
    prepare(model)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert_equal(profile(model, spec_of(model), pieces(batch, 5), classification_loss), gradients, RELATIVE)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_label_smoothing():
    model, batch, loss = bert(), BERT.batch(), partial(classification_loss, label_smoothing=0.2)
    assert_equal(profile(model, spec_of(model), [batch], loss), sample_gradients(model, batch, loss), RELATIVE)


def test_the_batch_dependent_mean_of_the_models_own_loss_is_not_used():
    """GPT-2's own loss divides by the tokens of the batch: samples alone and together then weigh differently."""
    torch.manual_seed(1)
    model, batch = GPT2.make().double().eval(), GPT2.batch()
    own = model(**batch.inputs, labels=batch.labels).loss.detach()
    alone = torch.stack([model(**one.inputs, labels=one.labels).loss.detach() for one in singles(batch)]).mean()
    assert abs(float(own - alone)) > 1e-3  # the trap is there
    apart = profile(model, spec_of(model), singles(batch), GPT2.loss)
    together = profile(model, spec_of(model), [batch], GPT2.loss)
    for name, found in weight_statistics(apart).items():
        assert weight_statistics(together)[name].trace == pytest.approx(found.trace, rel=RELATIVE), name


def test_padding_takes_no_part_in_where_an_answer_is():
    """The models' own loss is a softmax over padding too: it changes when a longer sample joins the batch."""
    case = CASES["bert-questions"]
    torch.manual_seed(1)
    model, batch = case.make().double().eval(), case.batch()
    wider = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in batch.inputs.items()}
    starts, ends = batch.labels.T
    with torch.no_grad():
        own = [model(**inputs, start_positions=starts, end_positions=ends).loss for inputs in (batch.inputs, wider)]
    assert abs(float(own[0] - own[1])) > 1e-3  # the trap is there
    plain = profile(model, spec_of(model), [batch], case.loss)
    padded = profile(model, spec_of(model), [replace(batch, inputs=wider)], case.loss)
    assert padded.mean_loss == pytest.approx(plain.mean_loss, rel=RELATIVE)
    for name, found in weight_statistics(plain).items():
        assert weight_statistics(padded)[name].trace == pytest.approx(found.trace, rel=RELATIVE), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_lower_precision_is_near_float64(dtype: torch.dtype, tolerance: float):
    """Activations and gradients round at u = 6e-8, 4e-3, 5e-4 in each of some 20 operations in a row: about 20 u."""
    model, batch = bert(dtype), BERT.batch()
    reference = bert()
    reference.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    gradients = sample_gradients(reference, batch, classification_loss)
    statistics = profile(model, spec_of(model), pieces(batch, 2, 3), classification_loss)
    total = sum(np.square(each).sum(axis=1).mean() for each in gradients.values())
    for name, found in weight_statistics(statistics).items():
        trace = np.square(gradients[name]).sum(axis=1).mean()
        assert found.trace == pytest.approx(trace, rel=tolerance, abs=1e-3 * tolerance * total), name
        energy = np.square(gradients[name].mean(axis=0)).sum()
        assert found.energy == pytest.approx(energy, rel=tolerance, abs=tolerance * trace), name


def test_float16_does_not_lose_small_gradients():
    """Most gradients of a loss scaled by 1e-5 are below float16's smallest number, 6e-8, without the loss scale."""
    model, batch = bert(torch.float16), BERT.batch()

    def small(output: object, batch: Batch) -> torch.Tensor:
        return 1e-5 * classification_loss(output, batch)

    full = weight_statistics(profile(model, spec_of(model), [batch], classification_loss))
    tiny = weight_statistics(profile(model, spec_of(model), [batch], small))
    total = sum(found.trace for found in full.values())
    for name, found in full.items():
        assert tiny[name].trace == pytest.approx(1e-10 * found.trace, rel=0.05, abs=1e-10 * 1e-3 * total), name


def test_a_compiled_model_is_measured_through_the_module_it_was_made_from():
    model, batch = bert(), BERT.batch()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    assert_equal(
        profile(compiled, spec_of(model), [batch], classification_loss),
        sample_gradients(model, batch, classification_loss),
        RELATIVE,
    )
    assert not graphs  # taps inside would be compiled anew for every state that they keep


def test_modules_compiled_in_place_are_refused_by_name():
    model = bert()
    model.bert.encoder.layer[1].compile()
    with pytest.raises(ProfilingError, match=r"bert\.encoder\.layer\.1: is compiled in place"):
        profile(model, spec_of(model), [BERT.batch()], classification_loss)


def test_each_statistic_alone_computes_nothing_else():
    """What is not asked for is absent, and neither mean gradients nor factors take memory for it."""
    model, batch = bert().float(), BERT.batch()
    spec = spec_of(model)
    has = {
        "fisher": "trace",
        "gradient": "energy",
        "spectrum": "plain_spectrum",
        "whitened_spectrum": "spectrum",
        "factors": "output_factor",
        "sketched_spectrum": "sketched_spectrum",
    }
    reference = profile(model, spec, [batch], classification_loss, statistics=(*SIGNAL, *has), everything=False)
    for statistic, field in has.items():
        found = profile(model, spec, [batch], classification_loss, statistics=(statistic,), everything=False)
        for layer, full in zip(found.layers, reference.layers, strict=True):
            for method, measured in layer.by_method.items():
                np.testing.assert_allclose(getattr(measured, field), getattr(full.by_method[method], field), 1e-6)
                present = {
                    name
                    for name in has.values()
                    if np.size(getattr(measured, name)) and getattr(measured, name) is not None
                }
                assert present <= {field, "energy"} if statistic != "fisher" else present == {field}
    nothing = profile(model, spec, [batch], classification_loss, statistics=(), everything=False)
    assert nothing.mean_loss == reference.mean_loss
    with Capture(model.requires_grad_(False), spec, StatisticsRequest.of(["fisher"]), 1).open():
        pass
    capture = Capture(model, spec, StatisticsRequest.of(["fisher"]), 1)
    with capture.open():
        capture.run(batch, classification_loss)
    assert all(not x.totals for x in capture.sums.accumulators.values())


def test_the_neural_tangent_kernel_is_the_gram_matrix_of_sample_gradients():
    model, batch = bert(), BERT.batch()
    spec = spec_of(model)
    gradients = sample_gradients(model, batch, classification_loss)
    names = [f"{layer.name}.weight" for layer in spec.layers if "lora" in layer.methods]
    expected = sum(gradients[name] @ gradients[name].T for name in names)
    kernel = profile(
        model, spec, pieces(batch, 2, 3), classification_loss, statistics=("ntk",), everything=False
    ).kernel
    np.testing.assert_allclose(kernel.gram, expected, rtol=RELATIVE, atol=RELATIVE * np.trace(expected))
    assert kernel.trace == pytest.approx(np.trace(expected), rel=RELATIVE)
    values = np.linalg.eigvalsh(expected)
    assert kernel.effective_rank == pytest.approx(values.sum() ** 2 / np.square(values).sum(), rel=RELATIVE)
    centre = np.eye(5) - 1 / 5
    target = (batch.labels[:, None] == batch.labels[None, :]).double().numpy()
    one, other = centre @ expected @ centre, centre @ target @ centre
    alignment = (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
    assert kernel.target_alignment == pytest.approx(alignment, rel=1e-6)


def test_measurable_modules_leave_out_the_layers_of_the_spec():
    model = bert()
    spec = spec_of(model)
    others = measurable_modules(model, spec)
    assert "classifier" in others
    assert "bert.embeddings.word_embeddings" in others
    assert not set(others) & {layer.name for layer in spec.layers}


def test_resnets_of_transformers_are_measured_too():
    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    model = hf.ResNetForImageClassification(config).double().eval()
    batch = Batch({"pixel_values": torch.randn(4, 3, 16, 16).double()}, torch.arange(4) % 3, torch.arange(4))
    gradients = sample_gradients(model, batch, classification_loss)
    assert_equal(profile(model, ModelSpec("", 0), pieces(batch, 3, 1), classification_loss), gradients, RELATIVE)


def test_weights_that_are_not_finite_are_named():
    model, batch = bert(), BERT.batch()
    model.bert.encoder.layer[1].output.dense.weight.data[0, :2] = float("nan")
    with pytest.raises(ProfilingError, match=r"finite: bert\.encoder\.layer\.1\.output\.dense\.weight \(2 of \d+\)$"):
        profile(model, spec_of(model), pieces(batch, 5), classification_loss)
