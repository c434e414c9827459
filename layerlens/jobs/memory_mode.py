"""Whether a model is profiled plainly, with checkpointed activations, or streamed from disk: what each is predicted to
need, and the choice under ``profiling.max_memory_gb``.

A step is traced on tensors without data (``cost.trace``), with taps as profiling has them, so nothing is loaded for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerlens.config import ProfilingConfig, RunConfig
from layerlens.cost.trace import trace_step
from layerlens.exceptions import ConfigurationError, LayerLensError
from layerlens.integrations.expert_products import plain_products
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.quantized import quantized_layers
from layerlens.integrations.torch_modules import first_input, frozen_without_dropout
from layerlens.integrations.transformers import blocks_of, dense_shape, without_cache
from layerlens.methods import OUTPUT
from layerlens.models import LayerSpec, ModelSpec, Provenance
from layerlens.models.model_spec import EMBEDDING
from layerlens.profiling.footprint import dense_inputs
from layerlens.profiling.projections import COLUMNS, PROBES, ROWS
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.sums import Place
from layerlens.registry import METHODS
from layerlens.tasks import Batch
from layerlens.tasks.losses import output_tensors
from layerlens.utils.memory import resident_bytes

PLAIN, CHECKPOINTED, STREAMED = "plain", "checkpointed", "streamed"
MARGIN = 1.15
"""What is predicted is multiplied by it: allocators round up, and libraries keep workspace."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a model is profiled.

    Args:
        mode: "plain", "checkpointed" or "streamed".
        why: one clause that is the same whenever the same configuration is run on the same machine.
        predicted_gb: peak resident memory (1e9 bytes) of the process in each mode, where it was predicted.
    """

    mode: str
    why: str
    predicted_gb: dict[str, float]

    def told(self) -> str:
        """For the log: the choice, the reason and the figures."""
        figures = ", ".join(f"{mode} {gb:.2f} GB" for mode, gb in self.predicted_gb.items())
        return f"profiling {self.mode}: {self.why}" + (f" (predicted: {figures})" if figures else "")


def plan_as_asked(profiling: ProfilingConfig) -> MemoryPlan | None:
    """The plan where nothing must be predicted; None where it is to be chosen by prediction."""
    mode, limit = profiling.memory_mode, profiling.max_memory_gb
    if mode != "auto":
        return MemoryPlan(mode, "profiling.memory_mode asks for it", {})
    return MemoryPlan(PLAIN, "no limit was given", {}) if limit is None else None


def choose_mode(config: RunConfig, predicted: dict[str, float], refused: dict[str, str]) -> MemoryPlan:
    """The first of plain, checkpointed and streamed that is predicted to keep within ``profiling.max_memory_gb``.

    Args:
        config: the job.
        predicted: GB by mode, of those that the model can be profiled in.
        refused: modes that it cannot be profiled in, and why.

    Raises:
        ConfigurationError: none keeps within it.
    """
    limit = config.profiling.max_memory_gb
    assert limit is not None
    over: list[str] = []
    for mode in (PLAIN, CHECKPOINTED, STREAMED):
        if mode not in predicted:
            continue
        if predicted[mode] <= limit:
            why = f"{' and '.join(over)} would exceed profiling.max_memory_gb: {limit:g}" if over else (
                f"it stays within profiling.max_memory_gb: {limit:g}"
            )  # fmt: skip
            return MemoryPlan(mode, why, predicted)
        over.append(mode)
    figures = ", ".join(f"{mode} {predicted[mode]:.2f} GB" for mode in over)
    reasons = "".join(f"; {mode} is not possible: {why}" for mode, why in refused.items())
    raise ConfigurationError(
        f"profiling.max_memory_gb: {limit:g}, but profiling is predicted to need {figures}{reasons}; raise it, or "
        "lower data.batch_size or data.max_length"
    )


def predict_memory(
    pretrained: PretrainedModel, spec: ModelSpec, batches: Sequence[Batch], request: StatisticsRequest, max_length: int
) -> dict[str, float]:
    """GB of resident memory that each mode is predicted to peak at, this process as it is now included.

    Args:
        pretrained: loaded, or with its weights on disk.
        spec: its layers.
        batches: the largest is the last.
        request: what is measured.
        max_length: the longest sequence, in tokens.
    """
    model = pretrained.model
    inputs = dense_inputs(
        batches[-1].inputs, _longest(batches[-1].inputs), samples=len(batches[-1].index) * batches[-1].rows, model=model
    )
    inputs.pop("attention_mask", None)  # models look into it, which a trace cannot
    twin = _without_data(model)
    weights = sum(x.numel() * x.element_size() for x in model.parameters() if x.is_meta)
    sums = {layer.name: _sum_bytes(layer, request, max_length) for layer in spec.layers}
    working = max(_working_bytes(layer, request, max_length) for layer in spec.layers)
    base = resident_bytes()
    step = _traced_bytes(twin, spec, inputs)
    predicted = {PLAIN: base + MARGIN * (weights + step + sum(sums.values()) + working)}
    if getattr(model, "supports_gradient_checkpointing", False):
        with checkpointed_activations(twin):
            step = _traced_bytes(twin, spec, inputs)
        predicted[CHECKPOINTED] = base + MARGIN * (weights + step + sum(sums.values()) + working)
    if pretrained.streamed is not None:
        predicted[STREAMED] = base + MARGIN * _streamed_bytes(twin, spec, inputs, sums, working)
    return {mode: 1e-9 * n_bytes for mode, n_bytes in predicted.items()}


@contextmanager
def checkpointed_activations(model: torch.nn.Module) -> Iterator[None]:
    """While open, blocks keep only what they are given, and run again in the backward pass.

    Raises:
        ConfigurationError: the model's blocks cannot.
    """
    given: Any = model
    if not getattr(given, "supports_gradient_checkpointing", False):
        raise ConfigurationError(
            f"profiling.memory_mode: {type(model).__name__} has no checkpointed activations (transformers' "
            "supports_gradient_checkpointing); use plain or streamed"
        )
    # transformers 5.24 renamed them; the old names are announced to go.
    enable = getattr(given, "activation_checkpointing_enable", None) or given.gradient_checkpointing_enable
    disable = getattr(given, "activation_checkpointing_disable", None) or given.gradient_checkpointing_disable
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        disable()


def memory_facts(provenance: Provenance, plan: MemoryPlan, config: RunConfig) -> Provenance:
    """What the manifest records of it: nothing where the user neither limited memory nor chose."""
    if config.profiling.memory_mode == "auto" and config.profiling.max_memory_gb is None:
        return provenance
    return replace(provenance, memory_mode=plan.mode, memory_mode_why=plan.why)


class _Keep(torch.autograd.Function):
    """What a tap keeps for the backward pass, without what it does there."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, anchor: torch.Tensor, *saved: torch.Tensor) -> Any:
        ctx.save_for_backward(*saved)
        ctx.count = len(saved)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None, *([None] * ctx.count)


def _without_data(model: torch.nn.Module) -> Any:
    """A copy whose weights are one number each, repeated: shapes without memory. Quantized layers are Linear ones."""
    memo: dict[int, Any] = {}
    for layer in quantized_layers(model).values():
        linear = torch.nn.Linear(*dense_shape(layer), bias=False, device="meta")
        linear.weight = torch.nn.Parameter(torch.zeros(()).expand(linear.weight.shape), requires_grad=False)
        memo[id(layer)] = linear
    packed = {id(parameter) for layer in quantized_layers(model).values() for parameter in layer.parameters()}
    for parameter in model.parameters():
        if id(parameter) in packed:
            continue
        twin = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        memo[id(parameter)] = torch.nn.Parameter(twin, requires_grad=False)
    return copy.deepcopy(model, memo).eval()


def _traced_bytes(model: Any, spec: ModelSpec, inputs: dict[str, torch.Tensor]) -> int:
    """Peak of what a step allocates, weights left out."""
    anchor = torch.zeros((), requires_grad=True)
    handles = []
    names = {name for name, _ in model.named_modules()}
    for layer in spec.layers:
        if layer.layer_type == "attention" or layer.name not in names:
            continue
        with_output = any(METHODS[name].reads == OUTPUT for name in layer.methods)

        def hook(module: Any, args: Any, kwargs: Any, output: Any, with_output: bool = with_output) -> Any:
            kept = (output.detach(),) if with_output else ()
            return _Keep.apply(output, anchor, first_input(args, kwargs).detach(), *kept)

        handles.append(model.get_submodule(layer.name).register_forward_hook(hook, with_kwargs=True))
    try:
        with frozen_without_dropout(model, checkpointing=True), without_cache(model), plain_products(model):
            return trace_step(model, inputs, _loss).peak_bytes
    finally:
        for handle in handles:
            handle.remove()


def _loss(output: Any) -> torch.Tensor:
    """Cross-entropy of whatever the model puts out: what a loss keeps hardly depends on which one it is."""
    logits = [x.flatten(0, -2).float() for x in output_tensors(output)]
    targets = [torch.zeros(len(x), dtype=torch.int64, device=x.device) for x in logits]
    pairs = zip(logits, targets, strict=True)
    return torch.stack([torch.nn.functional.cross_entropy(x, y, reduction="none").sum() for x, y in pairs]).sum()


def _streamed_bytes(
    twin: Any, spec: ModelSpec, inputs: dict[str, torch.Tensor], sums: dict[str, int], working: int
) -> float:
    """Two blocks' weights, the sums of one block, and the activations of a model with one block."""
    blocks = blocks_of(twin)
    parts = [_bytes_below(twin, block) for block in blocks]
    outside = sum(x.numel() * x.element_size() for x in twin.parameters()) - sum(parts)
    of_block = max(
        sum(sums[layer.name] for layer in spec.layers if layer.name.startswith(f"{block}.")) for block in blocks
    )
    stack, _, first = blocks[0].rpartition(".")
    members = twin.get_submodule(stack)
    kept = {name: child for name, child in members.named_children() if f"{stack}.{name}" not in blocks or name == first}
    members._modules.clear()
    members._modules.update(kept)
    step = _traced_bytes(twin, spec, inputs)
    return max(2 * max(parts) + of_block + working, outside + 2 * max(parts)) + step


def _bytes_below(model: torch.nn.Module, path: str) -> int:
    return sum(x.numel() * x.element_size() for x in model.get_submodule(path).parameters())


def _places(layer: LayerSpec, request: StatisticsRequest, max_length: int) -> list[Place]:
    """The matrices of every method of a layer."""
    tokens = layer.positions or max_length
    methods = [METHODS[name] for name in layer.methods]
    shapes = [x.matrix_shape(layer) for x in methods]
    looked_up = layer.layer_type == EMBEDDING
    if looked_up:  # what is summed has the rows of the weight first
        shapes = [(groups, n_in, n_out) for groups, n_out, n_in in shapes]
    return [
        request.place(shape, x.name, projected=True, tokens=tokens, looked_up=looked_up)
        for shape, x in zip(shapes, methods, strict=True)
    ]


def _sum_bytes(layer: LayerSpec, request: StatisticsRequest, max_length: int) -> int:
    """What is summed up and kept of a layer during the pass, float32; projections come with what reads them."""
    places = _places(layer, request, max_length)
    sums = [(one, place) for place in places for one in (*request.sums(place), *request.input_sums)]
    signs = sum(4 * (COLUMNS + PROBES + ROWS) * max(place.shape[1:]) for place in places if request.projects)
    return signs + sum(one.bytes(place) for one, place in sums)


def _working_bytes(layer: LayerSpec, request: StatisticsRequest, max_length: int) -> int:
    """What computing the statistics of one layer takes, one after the other: float64 copies and factorisations."""
    places = _places(layer, request, max_length)
    return 8 * max((one.working_floats(place) for place in places for one in request.statistics), default=0)


def _longest(inputs: dict[str, torch.Tensor]) -> int:
    return int(inputs["input_ids"].shape[1]) if "input_ids" in inputs else 0


def reason_of(error: LayerLensError) -> str:
    """An error's line without the key it begins with."""
    return str(error).split(": ", 1)[-1]
