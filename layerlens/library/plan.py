"""What the verbs of the library give back: ``Profile``, what was measured, and ``Plan``, what was chosen."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.config import RunConfig
from layerlens.exceptions import ManifestError
from layerlens.integrations.peft import lora_config
from layerlens.jobs.choose import Decision, solved
from layerlens.jobs.job import Job
from layerlens.jobs.result import CHOICE_FILES, STATISTICS_FILE
from layerlens.jobs.solve import Solution
from layerlens.jobs.write import now, report, writing
from layerlens.library.given import bare_model
from layerlens.library.tables import plan_html, plan_text
from layerlens.manifest import write_manifest
from layerlens.models import LORA, Choice, Manifest, ModelFacts, ModelSpec, ModelStatistics
from layerlens.profiling.statistics_file import statistics_to_bytes
from layerlens.tuning import apply, export_adapter
from layerlens.utils.atomic import atomic_write_bytes

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig


@dataclass(frozen=True)
class Profile:
    """What was measured of a model on a little data: all that a choice needs, without the model.

    Args:
        spec: the layers.
        statistics: of every layer.
        model: what a manifest records of the model.
        config: the settings that it was measured with.
        notes: what the user should know: the task and how it is known, what the loss is of, what was left out.
    """

    spec: ModelSpec
    statistics: ModelStatistics
    model: ModelFacts
    config: RunConfig
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        measured = (
            f"{len(self.spec.layers)} layers of {self.spec.model_name} measured: mean loss "
            f"{self.statistics.mean_loss:.4g} over {self.statistics.n_samples}"
        )
        return "\n".join([measured, *(f"- {note}" for note in self.notes)])

    __repr__ = __str__


@dataclass(frozen=True, repr=False)
class Plan:
    """Which layers to adapt, by which method at which rank, with the proof of how good that is.

    Made by ``layerlens.plan``, ``layerlens.choose`` and ``layerlens.load``.

    Args:
        manifest: the choice with its certificate, what it uses of every budget, and where it comes from.
        profile: what it was chosen from; None where only a manifest was loaded.
        notes: what the user should know.

    >>> import layerlens                                                         # doctest: +SKIP
    >>> plan = layerlens.plan(model, data, max_trainable_params="1M")            # doctest: +SKIP
    >>> trainer = SFTTrainer(model, args, peft_config=plan.lora_config())        # doctest: +SKIP
    """

    manifest: Manifest
    profile: Profile | None = None
    notes: tuple[str, ...] = ()
    factors: Mapping[str, torch.Tensor] | None = field(default=None, compare=False)
    _solution: Solution | None = field(default=None, compare=False)
    _model: Any = field(default=None, compare=False)

    def __str__(self) -> str:
        return plan_text(self.manifest, self.notes)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return plan_html(self.manifest, self.notes)

    def __reduce__(self) -> Any:
        raise TypeError("a Plan is not pickled: it refers to a model; use plan.save(DIRECTORY) and layerlens.load")

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
        of_lora = sum(row.cost for row in self.manifest.allocations if row.method == LORA)
        return of_lora / self.trainable_params if self.trainable_params else 0.0

    @cached_property
    def solution(self) -> Solution:
        """The allocation problem with its costs and utilities, and why each layer got its option.

        Raises:
            ManifestError: there are no statistics, or they and the configuration give another choice than the manifest.
        """
        if self._solution is not None:
            return self._solution
        profile = self._profile()
        found = solved(Job(profile.config, Path.cwd(), Path()), profile.spec, profile.statistics)
        rows = [row.layer for row in self.manifest.allocations if row.rank]
        entries = found.problem.entries(found.allocation.choice)
        chosen = [found.utilities.options[int(entry)] for entry in entries]
        again = [[one.layer, one.method, one.rank] for one in chosen if one.rank]
        if again != self.choice.rows():
            raise ManifestError(
                f"the statistics beside the manifest give another choice than its own ({len(again)} layers instead of "
                f"{len(rows)}); run layerlens optimize on them"
            )
        return found

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
            raise ManifestError(f"method: a LoraConfig holds {LORA!r} alone, got {method!r}; use plan.apply(model)")
        if self.manifest.lora.is_measured:
            raise ManifestError(
                f"lora_initialization: {self.manifest.lora.initialization!r} begins from measured factors, which a "
                "LoraConfig cannot say; use plan.apply(model), or the peft directory that plan.save writes"
            )
        if self.lora_share < 1.0 and self.choice.lora_options and method is None:
            warnings.warn(
                f"this LoraConfig holds {self.lora_share:.0%} of the chosen parameters: the choice has "
                f"{', '.join(sorted({one.method for one in self.choice.other_options}))} too, which PEFT has not; "
                'plan with methods=["lora"], or use plan.apply(model)',
                UserWarning,
                stacklevel=2,
            )
        return lora_config(self.choice, self._base(model), base=self.manifest.model.name_or_path)

    def apply(self, model: torch.nn.Module | None = None) -> torch.nn.Module:
        """The model ready to train: LoRA, adapters and prefixes put in, all else frozen; no output changes by it.

        Args:
            model: the base model, changed in place; by default the one that was planned for.

        Returns:
            a PEFT model where there is LoRA, else the model itself; ``layerlens.tuning.unapply`` takes it out again.

        Raises:
            ManifestError: the choice does not fit; the model is then unchanged.
        """
        base = self._base(model)
        return apply(base, self.manifest, factors=self.factors, check_fingerprint=model is not None)

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
            written.files |= write_manifest(self.manifest, written.directory, created_at=now())
            written.files |= export_adapter(self.manifest, base, written.directory, self.factors)
            written.files["statistics"] = atomic_write_bytes(
                written.directory / STATISTICS_FILE, statistics_to_bytes(profile.spec, profile.statistics)
            )
            report(Decision(self.solution, self.manifest), profile.statistics, {}, written)
        return written.files

    def to_dict(self) -> dict[str, Any]:
        """What ``manifest.json`` holds, apart from its date, and the notes."""
        return {**self.manifest.fields(), "notes": list(self.notes)}

    def _profile(self) -> Profile:
        if self.profile is None:
            raise ManifestError(
                f"there are no statistics beside the manifest ({STATISTICS_FILE}), so nothing more can be said than "
                "what it holds"
            )
        return self.profile

    def _base(self, model: torch.nn.Module | None) -> torch.nn.Module:
        found = model if model is not None else None if self._model is None else self._model()
        if found is None:
            raise ManifestError("model: the one that was planned for is gone or was never given; give it: model=")
        return bare_model(found)


def weak(model: Any) -> Any:
    """A reference that does not keep the model in memory; None of what is no module."""
    return weakref.ref(model) if hasattr(model, "parameters") else None
