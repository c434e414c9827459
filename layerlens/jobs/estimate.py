"""``layerlens estimate``: what a choice, or uniform LoRA, costs by the model's configuration, without weights or data.

The costs of a manifest and the estimate of its choice are the same figures: both come from the cost table, and what a
run measures for it is counted here without numbers (``jobs.shapes``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.cost import cost_table
from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.jobs.recorded import config_of
from layerlens.jobs.recorded_step import told_of_uncounted
from layerlens.jobs.shapes import Shapes, shapes_of
from layerlens.manifest.formats import quantity, resource_name
from layerlens.manifest.tables import html_table, text_table
from layerlens.models import LORA, NONE, RESOURCES, LayerSpec, Manifest, ModelSpec, Option, ResourceUse
from layerlens.models.tokens import TokenTraining
from layerlens.registry import METHODS, TASKS
from layerlens.sources import LoadRequest
from layerlens.tasks.guess import task_of_class

ALL = "all"


@dataclass(frozen=True)
class Estimate:
    """What a choice costs. ``str`` and a notebook show it as a table.

    Args:
        model: reference of the base model.
        task: that it is shapes for.
        dtype: precision of its weights.
        choice: "LoRA 8 on 14 layers", or "12 of 14 layers as in out/manifest.json".
        resources: each resource: what the frozen model needs, what the choice adds, and what that is predicted from.
        base_params, base_flops: parameters of the base model, and FLOPs of its forward pass on one batch.
        head_params: parameters of the task head, trained beside the choice; 0 where the model's own head stays.
        batch_size, sequence_length, device: the batch and the device that costs are predicted for.
        left_out: layers without the wanted rank, with the reason.
        notes: what a reader has to know: a sentence each.
    """

    model: str
    task: str
    dtype: str
    choice: str
    resources: tuple[ResourceUse, ...]
    base_params: int
    base_flops: float
    head_params: int
    batch_size: int
    sequence_length: int
    device: str
    left_out: dict[str, str]
    notes: tuple[str, ...]

    @property
    def trainable_params(self) -> int:
        """Parameters that the choice trains, the task head not counted."""
        return round(self.resources[0].added)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; resources are as in a manifest, without budgets."""
        fields = dataclasses.asdict(self)
        fields["notes"] = list(self.notes)
        fields["resources"] = [
            {name: value for name, value in use.items() if name not in ("budget", "multiplier")}
            for use in fields["resources"]
        ]
        return fields

    def __str__(self) -> str:
        return "\n\n".join(("\n".join(self._heads()), text_table(*self._table()), "\n".join(self.notes))).rstrip()

    def _repr_html_(self) -> str:
        lines = [f"<p>{escape(line)}</p>" for line in (*self._heads(), "", *self.notes) if line]
        heads = len(self._heads())
        return "".join(lines[:heads]) + html_table(*self._table()) + "".join(lines[heads:])

    def _heads(self) -> list[str]:
        batch = f"{self.batch_size} × {self.sequence_length} tokens" if self.sequence_length else (
            f"{self.batch_size} samples"
        )  # fmt: skip
        return [
            f"{self.choice}: {self.model}, {self.task}, {self.dtype}, {self.base_params:,} parameters",
            f"one batch of {batch} on a {self.device}; a forward pass of the frozen model: "
            f"{quantity('flops', self.base_flops)}",
        ]

    def _table(self) -> tuple[list[str], list[list[str]], str]:
        rows = []
        for use in self.resources:
            base = quantity(use.resource, use.base) if use.base else "–"
            amounts = (quantity(use.resource, value) for value in (use.added, use.total))
            rows.append([resource_name(use.resource), base, *amounts, use.source])
        return ["", "base", "added", "total", "predicted from"], rows, "lrrrl"


@dataclass(frozen=True)
class Batch:
    """What costs are predicted for; None where the manifest, or the usual profile, says it.

    Args:
        size: samples in a batch.
        sequence_length: tokens in a sequence.
        device: "cpu" or "gpu".
    """

    size: int | None = None
    sequence_length: int | None = None
    device: str | None = None

    def of(self, profile: LatencyProfile) -> LatencyProfile:
        """The profile with what is given; figures of another device are left out."""
        given = {"batch_size": self.size, "sequence_length": self.sequence_length, "device_type": self.device}
        changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if changed.get("device_type", profile.device_type) != profile.device_type:
            changed |= dict.fromkeys(("peak_gflops", "memory_bandwidth_gb_s", "op_overhead_us"))
        return LatencyProfile(**{**profile.model_dump(), **changed})


def estimate(
    given: str | Path | Manifest,
    *,
    rank: int | None = None,
    targets: Sequence[str] = (ALL,),
    task: str | None = None,
    classes: int | None = None,
    dtype: str = "float32",
    model: str | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    device: str | None = None,
    base_dir: Path | None = None,
    name: str = "the manifest",
) -> Estimate:
    """What a manifest's choice costs, or LoRA of one ``rank`` on a model of which only the configuration is at hand.

    Args:
        given: a manifest; or with ``rank`` a transformers model: its directory, config.json or hub name.
        rank, targets, task, classes, dtype: of uniform LoRA, see ``estimate_lora``.
        model: of a manifest, its base model if it is not where the manifest says.
        batch_size, sequence_length, device: what costs are predicted for ("cpu" or "gpu"); the manifest's own, else 8
            sequences of 128 tokens on a CPU.
        base_dir: folder that relative paths start from.
        name: what the estimate calls a manifest.

    Raises:
        LayerLensError: with one line that says what to do; see ``estimate_lora`` and ``estimate_manifest``.
    """
    batch = Batch(batch_size, sequence_length, device)
    if isinstance(given, Manifest):
        if rank is not None:
            raise ConfigurationError("rank: a manifest has its own ranks; give a model for uniform LoRA")
        return estimate_manifest(given, model=model, batch=batch, base_dir=base_dir, name=name)
    if rank is None:
        raise ConfigurationError("rank: is needed for LoRA on a model; give one, such as 8, or a manifest")
    return estimate_lora(
        str(given), rank, targets=targets, task=task, classes=classes, dtype=dtype, batch=batch, base_dir=base_dir
    )


def estimate_lora(
    model: str,
    rank: int,
    *,
    targets: Sequence[str] = (ALL,),
    task: str | None = None,
    classes: int | None = None,
    dtype: str = "float32",
    batch: Batch = Batch(),
    base_dir: Path | None = None,
) -> Estimate:
    """Costs of LoRA with one rank on all layers that ``targets`` name.

    Args:
        model: directory, config.json or hub name of a transformers model; weights are not needed.
        rank: of every layer.
        targets: layers by the endings of their names, as PEFT's ``target_modules``; "all" for every layer that takes
            LoRA.
        task: what the model is tuned for; read off the configuration's architectures when None.
        classes: outputs of a classifier's head; those of the configuration when None.
        dtype: precision of the frozen weights.
        batch: what costs are predicted for.
        base_dir: folder that a relative path starts from.

    Raises:
        ModelNotFoundError: the configuration cannot be found or read.
        ModelSpecError: the model cannot be built from it, or not for the task.
        ConfigurationError: no layer is named, or sequences are longer than the model takes.
    """
    if rank < 1:
        raise ConfigurationError(f"rank: must be a whole number above 0, got {rank}")
    targets = tuple(targets.split(",") if isinstance(targets, str) else targets) or (ALL,)
    labels = tuple(map(str, range(classes or 0)))
    request = LoadRequest(model, task or _task_of(model, base_dir), labels, base_dir=base_dir, dtype=dtype)
    settings = OptimizationConfig(max_trainable_params=1, latency_profile=batch.of(LatencyProfile()))
    profile = settings.latency_profile
    shapes = shapes_of(request, profile.sequence_length, on_cpu=profile.device_type == "cpu")
    able = [layer for layer in shapes.spec.layers if LORA in layer.methods]
    _refuse_unknown(able, targets)
    named = [layer for layer in able if _is_target(layer, targets)]
    takers = [layer for layer in named if METHODS[LORA].takes_size(layer, rank)]
    left_out = {layer.name: METHODS[LORA].why_not_size(layer, rank) for layer in named if layer not in takers} | dict(
        shapes.spec.left_out if _everything(targets) else {}
    )
    if not takers:
        raise ConfigurationError(f"rank: no layer takes rank {rank}; {next(iter(left_out.items()))}")
    options = [Option(layer.name, LORA, rank) for layer in takers]
    where = "" if _everything(targets) else f" ({', '.join(targets)})"
    choice = f"LoRA {rank} on {len(options)} of {len(able)} layers{where}"
    return _estimate(shapes, options, settings, choice, left_out)


def estimate_manifest(
    manifest: Manifest,
    *,
    model: str | None = None,
    batch: Batch = Batch(),
    base_dir: Path | None = None,
    name: str = "the manifest",
) -> Estimate:
    """Costs of a manifest's choice, for another batch or device where one is given.

    Activations and FLOPs are counted on sequences as long as those that the run measured, or as long as ``batch`` says.

    Args:
        manifest: of a run or of ``optimize``.
        model: base model, if it is not where the manifest says.
        batch: what costs are predicted for.
        base_dir: folder that relative paths start from.
        name: what the estimate calls the manifest.

    Raises:
        ManifestError: it was made for a model of another shape, or does not say which.
        LayerLensError: see ``estimate_lora``; the manifest does not record its configuration.
    """
    facts, config = manifest.model, config_of(manifest)
    reference, task = model or facts.name_or_path, facts.task
    if not reference or not task:
        raise ManifestError(f"{name} has no model.{'task' if reference else 'name_or_path'}, which an estimate needs")
    request = LoadRequest(
        reference, task, facts.labels or (), base_dir=base_dir, dtype=facts.dtype or "float32",
        quantization=facts.quantization,
    )  # fmt: skip
    recorded = config.optimization.latency_profile
    profile = batch.of(recorded)
    settings = config.optimization.model_copy(update={"latency_profile": profile})
    longer = profile.sequence_length != recorded.sequence_length
    counted = profile.sequence_length if longer else config.data.max_length
    sites, methods = config.profiling.adapter_sites, config.optimization.methods
    on_cpu = profile.device_type == "cpu"
    shapes = shapes_of(
        request, counted, adapter_sites=sites, methods=methods, on_cpu=on_cpu, step_length=profile.sequence_length,
        only=config.profiling.layers, tokens=TokenTraining.of(facts.tokens) if facts.tokens else None,
    )  # fmt: skip
    _refuse_other_shape(manifest, shapes.spec)
    options = [Option(row.layer, row.method, row.rank) for row in manifest.allocations if row.method != NONE]
    choice = f"{len(options)} of {len(manifest.allocations)} layers as in {name}"
    accumulates = config.training.gradient_accumulation > 1
    return _estimate(shapes, options, settings, choice, {}, accumulates=accumulates, checkpointed=manifest.checkpointed)


def _estimate(
    shapes: Shapes, options: Sequence[Option], settings: OptimizationConfig, choice: str, left_out: Mapping[str, str],
    accumulates: bool = False, checkpointed: Sequence[str] = (),
) -> Estimate:  # fmt: skip
    """What ``options`` cost."""
    spec, profile = shapes.spec, settings.latency_profile
    costs = cost_table(spec, shapes.footprint, options, settings, accumulates=accumulates, checkpointed=checkpointed)
    uses, totals = [], costs.total(np.arange(len(options)))
    for name in RESOURCES:
        if name in costs.source:
            base, total = costs.frozen[name], totals[name]
            uses.append(ResourceUse(name, None, base, total - base, total, 0.0, costs.source[name]))
    return Estimate(
        model=shapes.request.reference,
        task=shapes.request.task,
        dtype=shapes.request.dtype,
        choice=choice,
        resources=tuple(uses),
        base_params=spec.total_params,
        base_flops=shapes.footprint.forward_flops * (profile.batch_size if spec.per_sample else profile.tokens),
        head_params=shapes.head_params,
        batch_size=profile.batch_size,
        sequence_length=0 if spec.per_sample else profile.sequence_length,
        device=profile.device_type,
        left_out=dict(left_out),
        notes=tuple(_notes(shapes, left_out)),
    )


def _notes(shapes: Shapes, left_out: Mapping[str, str]) -> Iterator[str]:
    of = "samples" if shapes.spec.per_sample else f"full sequences of {shapes.counted_length} tokens"
    yield (
        f"Base: weights in {shapes.request.dtype}; activations kept from the first block on and FLOPs, counted on {of} "
        "without numbers. Parameters and FLOPs are those that the choice adds."
    )
    if shapes.head_params:
        yield f"A task head of {shapes.head_params:,} parameters is trained beside them."
    if shapes.spec.tokens is not None:
        yield f"Rows of embeddings with {shapes.spec.tokens.trainable_params:,} parameters are trained beside them."
    if shapes.unrecorded:
        yield (
            f"No training step could be recorded ({shapes.unrecorded}), so memory is an upper bound and the time of a "
            "step is not predicted."
        )
    if shapes.footprint.step is not None and shapes.footprint.step.uncounted:
        told = told_of_uncounted(shapes.footprint.step)
        yield f"{told[0].upper()}{told[1:]}."
    if shapes.stored:
        yield f"{shapes.stored} Weights that are not quantized are in {shapes.request.dtype}."
    for layer, reason in left_out.items():
        yield f"Left out: {layer}: {reason}."


def _task_of(model: str, base_dir: Path | None) -> str:
    """The task of the class that the model was saved from.

    Raises:
        ConfigurationError: it has none.
    """
    request = LoadRequest(model, base_dir=base_dir)
    architectures = request.source.architectures(request)
    for name in architectures:
        if task := task_of_class(name):
            return task
    came = f"the configuration names {architectures[0]}" if architectures else "the configuration names no class"
    known = ", ".join(kind.name for kind in TASKS.values() if kind.auto_class)
    raise ConfigurationError(f"task: {came}, which says no task; give one of {known}")


def _everything(targets: Sequence[str]) -> bool:
    return tuple(targets) == (ALL,)


def _is_target(layer: LayerSpec, targets: Sequence[str]) -> bool:
    return _everything(targets) or any(layer.name == x or layer.name.endswith(f".{x}") for x in targets)


def _refuse_unknown(layers: Sequence[LayerSpec], targets: Sequence[str]) -> None:
    for target in targets:
        if not any(_is_target(layer, (target,)) for layer in layers):
            known = ", ".join(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers))
            raise ConfigurationError(f"targets: no layer that takes LoRA is named {target!r}; known: {known}, or {ALL}")


def _refuse_other_shape(manifest: Manifest, spec: ModelSpec) -> None:
    """Raise ManifestError where the manifest was made for a model with other layers or widths."""
    layers = {layer.name: layer for layer in spec.layers}
    for row in manifest.allocations:
        layer = layers.get(row.layer)
        if layer is None:
            raise ManifestError(f"{row.layer}: {spec.model_name} has no such layer; the manifest is of another model")
        if row.method == NONE:
            continue
        trained = METHODS[row.method].trainable_params(layer, row.rank)
        if trained != row.cost:
            raise ManifestError(
                f"{row.layer}: {row.method} {row.rank} would train {trained:,} parameters of {spec.model_name}, the "
                f"manifest says {row.cost:,}; it was made for a model of another shape"
            )
