"""What the verbs of the library give back: a ``Plan``, what was chosen for a model and how good that provably is."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.integrations.checkpointing import checkpoint_blocks
from layerlens.integrations.peft import lora_config
from layerlens.jobs.decision import Decision
from layerlens.jobs.explained import ExplainedLayer, explained, solution_of
from layerlens.jobs.files import report, writing
from layerlens.jobs.frontier import hulls_around, traced
from layerlens.jobs.job import Job
from layerlens.jobs.result import CHOICE_FILES, STATISTICS_FILE
from layerlens.jobs.solve import Solution
from layerlens.library.given import bare_model
from layerlens.library.profile import Profile
from layerlens.library.sentences import transformer_in
from layerlens.library.tables import plan_html, plan_text
from layerlens.manifest import write_manifest
from layerlens.manifest.files import plain
from layerlens.manifest.frontier import TracedFrontier
from layerlens.models import LORA, Choice, Manifest
from layerlens.models.manifest import SCHEMA_VERSION
from layerlens.profiling.statistics_file import statistics_to_bytes
from layerlens.tuning import apply, export_adapter
from layerlens.tuning.task_head import Head, write_head
from layerlens.utils.atomic import atomic_write_bytes
from layerlens.vocabulary import RESOURCES

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig


@dataclass(frozen=True, repr=False)
class Plan:
    """Which layers to adapt, by which method at which rank, with the proof of how good that is.

    Made by ``layerlens.plan``, ``layerlens.choose`` and ``layerlens.load``.

    Args:
        manifest: the choice with its certificate, what it uses of every budget, and where it comes from.
        profile: what it was chosen from; None where only a manifest was loaded.
        notes: what the user should know.

    >>> plan = layerlens.plan(model, loader, max_trainable_params="2k")
    >>> plan.lora_config().r == max(plan.ranks.values())
    True
    """

    manifest: Manifest
    profile: Profile | None = None
    notes: tuple[str, ...] = ()
    factors: Mapping[str, torch.Tensor] | None = field(default=None, compare=False)
    _solution: Solution | None = field(default=None, compare=False)
    _model: Any = field(default=None, compare=False)
    _head: Head = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return plan_text(self.manifest, self.notes)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return plan_html(self.manifest, self.notes)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Plan cannot be pickled, because it refers to a model; use plan.save(DIRECTORY) and layerlens.load"
        )

    def __copy__(self) -> Plan:
        return self  # nothing about a plan can be changed

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self

    @property
    def choice(self) -> Choice:
        """What is put into the model."""
        return self.manifest.choice

    @property
    def ranks(self) -> dict[str, int]:
        """LoRA rank by layer."""
        return self.choice.lora_ranks()

    @property
    def trainable_params(self) -> int:
        """Parameters that the choice trains, the task head not counted."""
        return self.manifest.trainable_params

    @property
    def lora_share(self) -> float:
        """Share of the chosen parameters that is LoRA, which is what a LoraConfig and ``peft/`` hold."""
        return self.manifest.lora_share

    @property
    def head(self) -> Head:
        """Weights of a new task head as it was fitted before measuring, by name; empty where no head is new."""
        return self._head or ({} if self.profile is None else self.profile.statistics.head)

    @cached_property
    def solution(self) -> Solution:
        """The allocation problem with its costs and utilities, and why each layer got its option.

        Raises:
            ManifestError: there are no statistics beside the manifest.
            ActivationCacheError: they are not those that the manifest was chosen by.
        """
        if self._solution is not None:
            return self._solution
        profile = self._profile()
        return solution_of(self.manifest, profile.spec, profile.statistics)

    def why(self, layer: str) -> ExplainedLayer:
        """Why a layer got its option: all its options with their costs, the runner-up, and what would make it win.

        Args:
            layer: its module path, or an ending of it that no other layer has.

        Returns:
            what prints, and shows in a notebook, as a table and a few sentences; ``chosen``, ``runner_up``, ``options``
            and ``reasons`` are the parts.

        Raises:
            ConfigurationError: there is no such layer (the nearest are named), or none that can be adapted.
            ManifestError: a manifest was loaded that has no statistics beside it.

        >>> why = plan.why("model.layers.1.self_attn.v_proj")
        >>> print(why.reasons[0])  # doctest: +ELLIPSIS
        model.layers.1.self_attn.v_proj has ...
        >>> why.chosen.rank == plan.ranks.get(why.layer, 0)
        True
        """
        left_out = self.manifest.model.left_out or {}
        if layer in left_out:
            raise ConfigurationError(f"{layer} is not offered any option: {left_out[layer]}")
        return explained(self.solution, layer)

    def frontier(
        self, resource: str = "trainable_params", budgets: Sequence[float | str] = (), points: int = 10
    ) -> TracedFrontier:
        """What more or less of one budget would buy, with a proof at each; the model is not needed.

        Args:
            resource: whose budget varies: trainable_params, flops, vram_gb or latency_ms.
            budgets: where allocations are certified, in the resource's unit or as text ("300k", "8GB", "20ms"); when
                empty, ``points`` budgets evenly spread on a logarithmic scale.
            points: at least 2.

        Returns:
            ``rows`` (one for each budget, with score, bound and gap), the exact ``hull``, and ``plot()``.

        Raises:
            ConfigurationError: an unknown resource, or a budget that is none.
            InfeasibleError: a budget allows nothing.
            ManifestError: a manifest was loaded that has no statistics beside it.

        >>> found = plan.frontier(budgets=["1k", "2k"])
        >>> found.rows[0].score <= found.rows[1].score
        True
        >>> axes = found.plot()
        """
        if isinstance(points, bool) or not isinstance(points, int) or points < 2:
            raise ConfigurationError(f"points: must be a whole number, at least 2, got {points!r}")
        profile = self._profile()
        amounts = [_amount(resource, budget) for budget in budgets]
        found = traced(profile.spec, profile.statistics, profile.config, resource, budgets=amounts, points=points)
        used = next((use.total for use in self.manifest.resources if use.resource == resource), None)
        if used is None or self.manifest.predicted.cheapest is not None:  # whose score is a cost
            return found
        return replace(found, chosen=(used, self.manifest.score))

    def lora_config(self, model: torch.nn.Module | None = None, *, method: str | None = None) -> LoraConfig:
        """The LoRA of the choice as an ordinary ``peft.LoraConfig`` for the model, with ranks and alphas by layer.

        A task head that the choice trains is in ``modules_to_save``, so that PEFT trains, saves and loads it too.

        Args:
            model: the base model; by default the one that was planned for.
            method: "lora" where it is known that the choice holds more than LoRA, and that is all that is wanted.

        Raises:
            ManifestError: there is no LoRA in the choice, it begins from measured factors, or the model is gone.
        """
        if method not in (None, LORA):
            raise ManifestError(f"method: a LoraConfig holds only {LORA!r}, got {method!r}; use plan.apply(model)")
        if self.manifest.lora.is_measured:
            raise ManifestError(
                f"lora_initialization: {self.manifest.lora.initialization!r} starts from measured factors, which a "
                "LoraConfig cannot hold; use plan.apply(model), or the peft directory that plan.save writes"
            )
        if self.lora_share < 1.0 and self.choice.lora_options and method is None:
            warnings.warn(
                f"this LoraConfig holds {self.lora_share:.0%} of the chosen parameters: the choice has "
                f"{', '.join(sorted({one.method for one in self.choice.other_options}))} too, which PEFT does not "
                'have; plan with methods=["lora"], or use plan.apply(model)',
                UserWarning,
                stacklevel=2,
            )
        return lora_config(self.choice, self._base(model), base=self.manifest.model.place)

    def apply(self, model: torch.nn.Module | None = None) -> torch.nn.Module:
        """The model ready to train: LoRA, adapters and prefixes put in, all else frozen; no output changes by it.

        A new task head begins as it was fitted before measuring, as in ``peft/``; ``layerlens.tuning.unapply`` gives
        the model its own back.

        Args:
            model: the base model, changed in place; by default the one that was planned for.

        Returns:
            a PEFT model where there is LoRA, else the model itself; ``layerlens.tuning.unapply`` takes it out again.

        Raises:
            ManifestError: the choice does not fit; the model is then unchanged.
        """
        base = self._base(model)
        return apply(base, self.manifest, factors=self.factors, head=self.head, check_fingerprint=model is not None)

    def checkpoint(self, model: torch.nn.Module | None = None) -> None:
        """Checkpoint the activations of just the blocks that the plan names, in a model that any trainer trains.

        For a model of ``get_peft_model``: a LoraConfig cannot say it, and a trainer's own ``gradient_checkpointing``
        checkpoints every block (leave it off). ``apply`` does this by itself.

        Args:
            model: the base model, or one with adapters in it; by default the one that was planned for.

        Raises:
            ManifestError: the model has no such block; nothing is changed then.
        """
        checkpoint_blocks(transformer_in(model) if model is not None else self._base(None), self.choice.checkpointed)

    def save(self, directory: str | Path, model: torch.nn.Module | None = None) -> dict[str, Path]:
        """Write what ``layerlens run`` writes: manifest, adapter directory, statistics and report, all or nothing.

        Args:
            directory: made if it is not there; what an earlier run wrote there is replaced.
            model: the base model; by default the one that was planned for.

        Returns:
            paths by name.

        Raises:
            OutputError: it cannot be written.
            ManifestError: the model is gone, or is another one.
        """
        base, profile = self._base(model), self._profile()
        job = Job(profile.config, Path.cwd(), Path(directory).expanduser())
        with writing(job, (*CHOICE_FILES, STATISTICS_FILE)) as written:
            written.files |= write_manifest(self.manifest, written.directory, created_at=written.created_at)
            written.files |= export_adapter(self.manifest, base, written.directory, self.factors, head=self.head)
            written.files |= write_head(self.head, written.directory)
            written.files["statistics"] = atomic_write_bytes(
                written.directory / STATISTICS_FILE, statistics_to_bytes(profile.spec, profile.statistics)
            )
            hulls = hulls_around(profile.spec, profile.config.optimization, self.solution)
            report(Decision(self.solution, self.manifest), profile.statistics, {}, written, hulls)
        return written.files

    def to_dict(self) -> dict[str, Any]:
        """Everything that the plan says as JSON values: what ``manifest.json`` holds apart from its date, and more.

        Besides the manifest's fields these are ``ranks`` (LoRA rank by layer), ``trainable_params``, ``lora_share`` and
        ``notes``.
        """
        own = {"trainable_params": self.trainable_params, "lora_share": self.lora_share, "notes": self.notes}
        return dict(plain({"schema_version": SCHEMA_VERSION, **self.manifest.fields(), "ranks": self.ranks, **own}, ""))

    def _profile(self) -> Profile:
        if self.profile is None:
            raise ManifestError(
                f"there are no statistics beside the manifest ({STATISTICS_FILE}), so only the manifest's own figures "
                "are available"
            )
        return self.profile

    def _base(self, model: torch.nn.Module | None) -> torch.nn.Module:
        found = model if model is not None else None if self._model is None else self._model()
        if found is None:
            raise ManifestError("model: the model of this plan is gone or was never given; pass it as model=")
        return bare_model(transformer_in(found))


def weak(model: Any) -> Any:
    """A reference that does not keep the model in memory; None of what is not a module."""
    return weakref.ref(model) if hasattr(model, "parameters") else None


def _amount(resource: str, budget: float | str) -> float:
    """A budget as a number in the resource's unit."""
    if not isinstance(budget, str):
        return budget
    if resource not in RESOURCES:
        raise ConfigurationError(f"unknown resource {resource!r}; known: {', '.join(RESOURCES)}")
    try:
        return float(RESOURCES[resource].quantity.parse(budget))
    except ValueError as error:
        raise ConfigurationError(f"budgets: {error}, got {budget!r}") from error
