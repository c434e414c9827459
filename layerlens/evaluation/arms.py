"""What arms with a colon choose (``top:3:v,o``, ``cheapest:0.95``): layers by depth or kind, a manifest, the cheapest.

The blocks are those of the model's specification (``LayerSpec.block``), in forward order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.config.optimization import CHEAPEST, STEP
from layerlens.config.study_arms import BOTTOM, KINDS, TOP, CheapestArm, LayersArm, ManifestArm
from layerlens.cost import cost_table
from layerlens.cost.measure import here
from layerlens.evaluation.study_task import StudyTask, lora_layers, lora_spec
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.expert_products import plain_products
from layerlens.integrations.transformers import without_cache
from layerlens.jobs.costs import device_profile
from layerlens.jobs.find import find_allocation
from layerlens.jobs.recorded_step import UNRECORDABLE, has_figures
from layerlens.jobs.solve import OF_SETS
from layerlens.manifest import read_manifest
from layerlens.methods import enumerate_options
from layerlens.models import LORA, CostTable, LayerSpec, ModelStatistics, UtilityTable
from layerlens.models.step import StepRecord
from layerlens.optimization.cheapest import Reference, cost_share, uniform_reference
from layerlens.optimization.constraints import matching
from layerlens.profiling.step_record import record_step
from layerlens.rank_rules import Ranks
from layerlens.registry import RANK_RULES, UTILITY_MODELS
from layerlens.tasks import Batch
from layerlens.tasks.losses import output_tensors
from layerlens.utility import utility_table
from layerlens.utils.places import default_cache_dir

SAMPLES = (2, 4)
"""Of the batches that a step is recorded with."""
SEARCH_TIME = 4.0
"""CP-SAT's limit of a choice, in its deterministic units."""


def layers_of(arm: LayersArm, task: StudyTask) -> list[LayerSpec]:
    """The layers that the arm adapts, in forward order.

    Raises:
        ConfigurationError: the model has fewer blocks, or none of these layers.
    """
    layers, spec = lora_layers(task), lora_spec(task)
    blocks = sorted({layer.block for layer in layers if layer.block is not None})
    if arm.blocks > len(blocks):
        found = f"{len(blocks)} blocks" if blocks else "no blocks that LayerLens knows"
        raise ConfigurationError(
            f"study.arms: {arm.end}:{arm.blocks} asks for {arm.blocks} blocks; the model has {found}"
        )
    if arm.end == TOP:
        blocks = blocks[-arm.blocks :]
    elif arm.end == BOTTOM:
        blocks = blocks[: arm.blocks]
    chosen = [layer for layer in layers if not arm.blocks or layer.block in blocks]
    if not arm.kinds:
        return chosen
    roles = {layer.role for layer in layers if layer.role}
    named: set[str] = set()
    for kind in arm.kinds:
        of_kind = KINDS.get(kind)
        if of_kind is None:
            named |= set(matching(spec, kind, "study.arms"))
        elif not roles & set(of_kind):
            known = ", ".join(sorted(roles)) or "none; give patterns for names, such as '*.attn.*'"
            raise ConfigurationError(f"study.arms: the model has no layers of the kind {kind!r}; its roles: {known}")
        else:
            named |= {layer.name for layer in layers if layer.role in of_kind}
    found_layers = [layer for layer in chosen if layer.name in named]
    if not found_layers:
        raise ConfigurationError(
            f"study.arms: {'+'.join(arm.kinds)} names no layer of the {arm.end} {arm.blocks} blocks"
        )
    return found_layers


def ranks_on_layers(arm: LayersArm, task: StudyTask, budget: int) -> Ranks:
    """Uniform LoRA on the arm's layers: the largest equal rank within the budget, the rest over the depth.

    Raises:
        ConfigurationError: see ``layers_of``; or the budget pays for rank 1 on none of them.
    """
    ranks: Ranks = RANK_RULES["uniform"].choose(layers_of(arm, task), budget, {}, 0)
    if not ranks:
        raise ConfigurationError(f"study.arms: {budget} parameters pay for rank 1 on none of the layers of {arm}")
    return ranks


def manifest_ranks(arm: ManifestArm, task: StudyTask, base_dir: Path) -> Ranks:
    """The LoRA ranks of the manifest.

    Raises:
        ManifestError: it cannot be read.
        ConfigurationError: it has other methods than LoRA, or layers that the model has not.
    """
    manifest = read_manifest(base_dir / arm.path)
    others = sorted({option.method for option in manifest.choice.chosen} - {LORA})
    if others:
        raise ConfigurationError(
            f"study.arms: {arm.path} has {', '.join(others)}; a study trains LoRA, so give a manifest with LoRA alone"
        )
    ranks = manifest.choice.lora_ranks()
    known = {layer.name for layer in lora_layers(task)}
    unknown = [name for name in ranks if name not in known]
    if unknown:
        raise ConfigurationError(
            f"study.arms: {arm.path} adapts {unknown[0]}, which this model does not have as a layer for LoRA (and "
            f"{len(unknown) - 1} more); give a manifest of this model"
        )
    if not ranks:
        raise ConfigurationError(f"study.arms: {arm.path} adapts no layer")
    return ranks


@dataclass(frozen=True)
class Sets:
    """What sets of LoRA ranks are predicted to keep and to cost against uniform LoRA of a budget.

    Args:
        config: the objective ``cheapest`` within the budget, with all the ranks that are looked at.
        utilities, costs: of its options.
        reference: uniform LoRA.
    """

    config: OptimizationConfig
    utilities: UtilityTable
    costs: CostTable
    reference: Reference

    @classmethod
    def of(
        cls,
        task: StudyTask,
        statistics: ModelStatistics,
        budget: int,
        *,
        profile: LatencyProfile,
        arm: CheapestArm | None = None,
        ranks: Sequence[int] = (),
        margin: float = 0.05,
    ) -> Sets:
        """For a task.

        Args:
            task: what is trained.
            statistics: with a recorded step where time or memory is to be predicted by it.
            budget: trainable parameters.
            profile: device that costs are for, and the batch.
            arm: what is to be least.
            ranks: further ones beside the task's and uniform LoRA's own.
            margin: that may be lost, where the arm gives no share.
        """
        spec = lora_spec(task)
        uniform = RANK_RULES["uniform"].choose(lora_layers(task), budget, {}, 0)
        arm = CheapestArm() if arm is None else arm
        config = OptimizationConfig(
            max_trainable_params=budget,
            methods=(LORA,),
            lora_ranks=tuple({*task.ranks, *uniform.values(), *ranks}),
            latency_profile=profile,
            objective=CHEAPEST,
            quality_margin=margin if arm.share is None else 1.0 - arm.share,
            minimise=arm.minimised,
            refine_deterministic_time=SEARCH_TIME,
        )
        options = enumerate_options(spec, config.ranks())
        utilities = utility_table(OF_SETS, spec, statistics, options, {})
        costs = cost_table(spec, statistics, utilities.options, config)
        power = UTILITY_MODELS[OF_SETS].set_power
        return cls(config, utilities, costs, uniform_reference(spec, utilities, costs, config, power))

    def entries(self, ranks: Mapping[str, int]) -> np.ndarray:
        """The options of these ranks, int64."""
        place = {(option.layer, option.rank): index for index, option in enumerate(self.utilities.options)}
        return np.array(
            sorted(place[layer, ranks.get(layer, 0)] for layer in {o.layer for o in self.utilities.options})
        )

    def predicted(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """The share of uniform LoRA's gain that it keeps, its cost as a share of uniform LoRA's, and its use."""
        entries = self.entries(ranks)
        use = self.costs.total(entries)
        own = {name: float(use[name]) for name in self.costs.source if name in use}
        return {"kept": self.reference.kept(entries), "cost_share": cost_share(self.config, self.reference, use), **own}

    def cheapest(self, task: StudyTask) -> tuple[Ranks, dict[str, Any]]:
        """(ranks, what is predicted of them): uniform LoRA's own where nothing is saved."""
        solution = find_allocation(lora_spec(task), self.utilities, self.costs, self.config, seed=0, threads=1)
        problem, choice = solution.problem, solution.allocation.choice
        options = [self.utilities.options[int(entry)] for entry in problem.entries(choice)]
        assert solution.saving is not None
        said = asdict(solution.saving)
        kept = ("asked_share", "kept_share", "cost_share", "least_cost_share", "saves", "reason")
        return {option.layer: option.rank for option in options if option.rank}, {name: said[name] for name in kept}


def profile_of(task: StudyTask, device: LatencyProfile | None = None) -> LatencyProfile:
    """The device with the task's batch."""
    tokens = task.train.inputs.get("input_ids")
    length = 1 if tokens is None else int(tokens.shape[1])
    return (device or LatencyProfile()).model_copy(update={"batch_size": task.batch_size, "sequence_length": length})


def with_recorded_step(task: StudyTask, statistics: ModelStatistics, profile: LatencyProfile) -> ModelStatistics:
    """The statistics with a training step of the task, and the rates of this device, measured where they are not known.

    Raises:
        ConfigurationError: a step cannot be recorded.
    """
    try:
        step = recorded_step(task)
    except UNRECORDABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"study.arms: cheapest needs the time of a training step, which could not be recorded ({reason}); "
            "write cheapest:SHARE:trainable_params, or leave it out"
        ) from error
    measured = not has_figures(profile) and here(profile.device_type)
    alone = torch.get_num_threads() == 1  # then processor time is that of an idle machine
    rates = asdict(device_profile(default_cache_dir(), cpu_time=alone)) if measured else None
    return replace(statistics, step=replace(step, rates=rates))


def recorded_step(task: StudyTask) -> StepRecord:
    """A training step of the task as the study trains it, on tensors without data."""
    like, labels = task.train.inputs, task.train.labels
    length = like["input_ids"].shape[1] if "input_ids" in like else 0

    def step(samples: int) -> torch.Tensor:
        inputs = {name: torch.zeros((samples, *one.shape[1:]), dtype=one.dtype) for name, one in like.items()}
        if not isinstance(labels, torch.Tensor):  # transcripts: the loss is a small part of a step
            return torch.stack([tensor.sum() for tensor in output_tensors(task.model(**inputs))]).sum()
        batch = Batch(inputs, torch.zeros((samples, *labels.shape[1:]), dtype=labels.dtype), torch.arange(samples))
        return task.loss(task.model(**inputs), batch).mean()

    with without_cache(task.model), plain_products(task.model):
        return record_step(
            task.model, lora_spec(task), step, heads=task.heads, batch_sizes=SAMPLES, sequence_length=length
        )


def needs_a_step(arm: CheapestArm) -> bool:
    """Whether what is to be least follows from a recorded step."""
    return arm.minimised in (STEP, "vram_gb")
