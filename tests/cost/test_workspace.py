"""Memory that operations take for themselves: counted in predictions, held against real training steps, or told."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from step_cases import DEVICE

from benchmarks.audio_models import AUDIO
from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.cost import cost_table
from layerlens.cost.measure import peak_bytes, training_step
from layerlens.integrations.audio_input import freeze_front
from layerlens.integrations.flops import plain_counter
from layerlens.integrations.layers import model_spec
from layerlens.integrations.operations import OperationRecorder
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.recorded_step import StepOf, recorded, told_of_uncounted
from layerlens.methods import enumerate_options
from layerlens.models import NONE, Choice, Footprint, LoraSettings
from layerlens.profiling.step_calls import Autograd
from layerlens.registry import TASKS
from layerlens.tuning import apply

SAMPLES = 3


class Unet(torch.nn.Module):
    """Convolutions down and up again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.down = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.middle, self.up = torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ConvTranspose2d(32, 16, 2, 2)
        self.last, self.head = torch.nn.Conv2d(32, 16, 3, padding=1), torch.nn.Linear(16, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        top = self.first(pixel_values).relu()
        below = self.middle(self.down(top).relu()).relu()
        out: torch.Tensor = self.head(self.last(torch.cat([self.up(below), top], 1)).relu().mean((2, 3)))
        return out


def wav2vec2() -> Any:
    model = AUDIO["wav2vec2"].make(num_labels=5)
    freeze_front(model)  # as loading it does
    return model


class Recurrent(torch.nn.Module):
    """A recurrent layer between Linears."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        wide = settings.get("proj_size", 32) * (2 if settings.get("bidirectional") else 1)
        self.first, self.down = torch.nn.Linear(8, 32, dtype=dtype), torch.nn.Linear(wide, 16, dtype=dtype)
        self.over = getattr(torch.nn, kind)(32, 32, batch_first=True, dtype=dtype, **settings)
        self.head = torch.nn.Linear(16, 5, dtype=dtype)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.down(self.over(self.first(frames))[0]).relu().mean(1))
        return out


RECURRENT: dict[str, Callable[[], Any]] = {
    "lstm": lambda: Recurrent("LSTM"),
    "lstm, two ways, two layers": lambda: Recurrent("LSTM", bidirectional=True, num_layers=2, dropout=0.1),
    "lstm, projected": lambda: Recurrent("LSTM", proj_size=16),
    "lstm, float64": lambda: Recurrent("LSTM", torch.float64),
    "gru": lambda: Recurrent("GRU"),
    "gru, two ways": lambda: Recurrent("GRU", bidirectional=True),
    "rnn": lambda: Recurrent("RNN"),
}


@pytest.mark.parametrize(
    ("build", "inputs", "task", "most"),
    [
        (Unet, {"pixel_values": torch.zeros(SAMPLES, 3, 64, 64)}, "image-classification", 1.05),
        (wav2vec2, {"input_values": torch.zeros(SAMPLES, 16_000)}, "audio-classification", 1.05),
        *[
            (
                make,
                {"frames": torch.zeros(SAMPLES, 60, 8, dtype=make().head.weight.dtype)},
                "image-classification",
                1.1,
            )
            for make in RECURRENT.values()
        ],
    ],
    ids=["unet", "wav2vec2", *RECURRENT],
)
def test_memory_of_real_steps_is_predicted_and_never_below(
    build: Callable[[], Any], inputs: Any, task: str, most: float
) -> None:
    of = StepOf(build().requires_grad_(False), TASKS[task], inputs, torch.zeros(SAMPLES, dtype=torch.int64))
    spec = model_spec(PretrainedModel(of.model, None, "", ()), "tiny", methods=("lora",), inputs=inputs)
    step = replace(recorded(of, spec), rates=asdict(DEVICE))
    profile = LatencyProfile(batch_size=SAMPLES, sequence_length=1)
    config = OptimizationConfig(max_trainable_params=1, latency_profile=profile, methods=("lora",))
    options = enumerate_options(spec, {"lora": (4,)})
    table = cost_table(spec, Footprint(0.0, 0.0, step), options, config)
    chosen = [entry for entry, option in enumerate(options) if option.method != NONE]
    for entries in (chosen, chosen[-1:]):
        choice = Choice.of(
            {options[entry].layer: ("lora", 4) for entry in entries}, lora=LoraSettings(2.0), head_modules=(), task=task
        )
        tuned = apply(build().requires_grad_(False), choice).train()
        *_, loss, _ = replace(of, model=tuned, real=True).losses()  # that of the task
        once, state = training_step(tuned, partial(loss, SAMPLES))
        once()
        gc.collect()
        measured = state + peak_bytes(once) + sum(weight.nbytes for weight in tuned.parameters())
        # What an option has for a moment is counted beside all that the frozen model has during that operation.
        assert 1.0 <= table.total(np.array(entries))["vram_gb"] / (1e-9 * measured) <= most


def test_an_operation_on_tensors_without_data_shows_what_it_has_for_itself() -> None:
    convolution = torch.nn.Conv2d(16, 16, 3)
    image = torch.zeros(2, 16, 32, 32)
    found = []
    for fake in (False, True):
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
            given = torch.zeros(2, 16, 32, 32) if fake else image
            with torch.no_grad(), OperationRecorder() as recorder:
                out = convolution(given)
        found.append(recorder.peak)
        n_bytes = 4 * out.numel()
    with torch.no_grad():
        # The allocator's own count has the output too; nothing else is alive.
        assert found == [peak_bytes(lambda: convolution(image))] * 2
    assert found[0] > n_bytes


def recorded_fake(run: Callable[[], Any]) -> OperationRecorder:
    with torch._subclasses.FakeTensorMode(), OperationRecorder() as recorder:
        run()
    return recorder


def convolved() -> Any:
    return torch.nn.functional.conv2d(torch.zeros(1, 3, 9, 9), torch.zeros(4, 3, 3, 3))


def softmax_of_complex_numbers() -> Any:
    return torch.softmax(torch.zeros(2, 4, dtype=torch.complex64), -1)  # torch knows its shape, and has no kernel


def recurrent_of_float64() -> Any:
    x, w, state = (torch.zeros(*shape, dtype=torch.float64) for shape in ((5, 2, 4), (16, 4), (2, 4)))
    bias = torch.zeros(16, dtype=torch.float64)
    return torch.ops.aten.mkldnn_rnn_layer(
        x, w, w, bias, bias, state, state, False, [], 2, 4, 1, True, False, False, True
    )


def recurrent_backward() -> Any:
    x, w, state, bias = torch.zeros(5, 2, 4), torch.zeros(16, 4), torch.zeros(2, 4), torch.zeros(16)
    return torch.ops.aten.mkldnn_rnn_layer_backward(
        x, w, w, bias, bias, state, state, x, state, state, x, None, None, False, 2, 4, 1, True, True, False, [],
        False, torch.zeros(0, dtype=torch.uint8),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("run", "operation", "reason"),
    [
        (softmax_of_complex_numbers, "aten._softmax", 'a trial fails ("softmax_lastdim_kernel_impl" not implemented'),
        (recurrent_of_float64, "aten.mkldnn_rnn_layer", "a trial fails ("),
        (recurrent_backward, "aten.mkldnn_rnn_layer_backward", "it reads states that cannot be made up"),
    ],
    ids=["no kernel", "another error", "states"],
)
def test_what_cannot_be_tried_is_told_with_the_reason(run: Callable[[], Any], operation: str, reason: str) -> None:
    found = recorded_fake(run)
    assert list(found.uncounted) == [operation]
    assert found.uncounted[operation].startswith(reason)


def test_what_is_too_large_or_for_too_little_memory_is_told_and_tried_later(monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces: Any = importlib.import_module("layerlens.integrations.workspace")
    monkeypatch.setattr(workspaces, "_known", {})
    with monkeypatch.context() as short:
        short.setattr(workspaces, "available_bytes", lambda: 1000)
        assert recorded_fake(convolved).uncounted == {
            "aten.convolution": "a trial may need 8.8e-06 GB, and 1e-06 GB are free"
        }
    with monkeypatch.context() as small:
        small.setattr(workspaces, "MOST_FLOPS", 10.0)
        assert recorded_fake(convolved).uncounted == {"aten.convolution": "it is too large to be tried"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert recorded_fake(convolved).uncounted == {"aten.convolution": "torch's profiler is at work"}
    with OperationRecorder() as without_device:
        torch.nn.functional.conv2d(torch.zeros(1, 3, 9, 9, device="meta"), torch.zeros(4, 3, 3, 3, device="meta"))
    assert without_device.uncounted == {"aten.convolution": "its tensors are on no device"}
    assert recorded_fake(convolved).uncounted == {}
    assert recorded_fake(convolved).workspace >= 0


def test_a_run_tells_what_its_memory_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces: Any = importlib.import_module("layerlens.integrations.workspace")
    monkeypatch.setattr(workspaces, "_known", {})
    monkeypatch.setattr(workspaces, "MOST_FLOPS", 10.0)
    monkeypatch.setattr(Autograd, "known", {})
    model = Unet().requires_grad_(False)
    inputs = {"pixel_values": torch.zeros(SAMPLES, 3, 64, 64)}
    of = StepOf(model, TASKS["image-classification"], inputs, torch.zeros(SAMPLES, dtype=torch.int64))
    spec = model_spec(PretrainedModel(model, None, "", ()), "tiny", methods=("lora",), inputs=inputs)
    step = recorded(of, spec)
    names = ("aten.convolution", "aten.convolution_backward")
    assert step.uncounted == dict.fromkeys(names, "it is too large to be tried")
    assert "may need more: aten.convolution: it is too large to be tried; aten.convolution_backward:" in (
        told_of_uncounted(step)
    )
    options = enumerate_options(spec, {"lora": (4,)})
    profile = LatencyProfile(batch_size=SAMPLES, sequence_length=1)
    config = OptimizationConfig(max_trainable_params=1, latency_profile=profile, methods=("lora",))
    source = cost_table(spec, Footprint(0.0, 0.0, step), options, config).source["vram_gb"]
    assert source.endswith("without what aten.convolution, aten.convolution_backward takes while it runs")
    again = type(step).of(json.loads(json.dumps(step.numbers())), step.arrays())
    assert again.uncounted == step.uncounted


def test_products_of_recurrent_layers_count_as_work() -> None:
    layer, x = torch.nn.LSTM(5, 6, bidirectional=True), torch.zeros(7, 3, 5)
    with plain_counter() as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 7 * 3 * (24 * 5 + 24 * 6)
