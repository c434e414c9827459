"""Memory that convolutions and norms take for themselves: counted in predictions, held against real training steps."""

from __future__ import annotations

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
from layerlens.integrations.layers import model_spec
from layerlens.integrations.operations import OperationRecorder
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.recorded_step import StepOf, recorded
from layerlens.methods import enumerate_options
from layerlens.models import NONE, Choice, Footprint, LoraSettings
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


@pytest.mark.parametrize(
    ("build", "inputs", "task"),
    [
        (Unet, {"pixel_values": torch.zeros(SAMPLES, 3, 64, 64)}, "image-classification"),
        (wav2vec2, {"input_values": torch.zeros(SAMPLES, 16_000)}, "audio-classification"),
    ],
    ids=["unet", "wav2vec2"],
)
def test_memory_of_real_steps_is_predicted_and_never_below(build: Callable[[], Any], inputs: Any, task: str) -> None:
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
        measured = state + peak_bytes(once) + sum(4 * weight.numel() for weight in tuned.parameters())
        # What an option has for a moment is counted beside all that the frozen model has during that operation.
        assert 1.0 <= table.total(np.array(entries))["vram_gb"] / (1e-9 * measured) <= 1.05


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
