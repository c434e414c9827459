"""``Profile``: the measurements of a model, which choices need in place of the model, in memory or in one file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.jobs.recorded import config_of, manifest_at
from layerlens.jobs.result import STATISTICS_FILE
from layerlens.jobs.solve import recorded_config
from layerlens.manifest import read_manifest
from layerlens.models import ModelFacts, ModelSpec, ModelStatistics
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.utils.atomic import atomic_write_bytes

SUFFIX = ".safetensors"
MADE_WITH = "made_with"
"""Where the statistics' provenance has the settings that they were measured with."""


@dataclass(frozen=True, repr=False)
class Profile:
    """The measurements of a model on a sample of data. ``layerlens.choose`` needs nothing else.

    Args:
        spec: the layers of the model.
        statistics: the statistics of every layer.
        model: what a manifest records about the model.
        config: the settings of the measurement.
        notes: what the user should know, one sentence each: the task and how LayerLens found it, the loss, and what was
            left out.
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

    def save(self, path: str | Path) -> Path:
        """Write the measurements to one file, for ``layerlens.choose`` in another program.

        Args:
            path: a file that ends in .safetensors, or a directory, where the file is then called
                statistics.safetensors.

        Returns:
            the path of the file. ``layerlens optimize`` reads it too, with a configuration.

        Raises:
            OutputError: the file cannot be written.

        >>> file = statistics.save("measured.safetensors")
        >>> layerlens.choose(file, max_trainable_params="1k").trainable_params <= 1000
        True
        """
        file = Path(path).expanduser()
        if file.suffix != SUFFIX:
            file /= STATISTICS_FILE
        made_with = {"config": recorded_config(self.config), "notes": list(self.notes)}
        kept = replace(self.statistics, provenance={**self.statistics.provenance, MADE_WITH: made_with})
        return atomic_write_bytes(file, statistics_to_bytes(self.spec, kept))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read the measurements that ``save`` or ``layerlens run`` wrote.

        Args:
            path: the file, or its directory.

        Raises:
            ActivationCacheError: the file is missing, damaged, or of another format.
            ManifestError: neither the file nor a manifest beside it records the settings of the measurement.
        """
        file = Path(path).expanduser()
        file = file / STATISTICS_FILE if file.is_dir() else file
        spec, statistics = load_statistics(file)
        provenance = dict(statistics.provenance)
        made_with = provenance.pop(MADE_WITH, None)
        notes = tuple(made_with["notes"]) if made_with else ()
        config = RunConfig.model_validate(made_with["config"]) if made_with else _config_beside(file)
        facts = ModelFacts.of(provenance.get("model", {}))
        return cls(spec, replace(statistics, provenance=provenance), facts, config, notes)


def _config_beside(file: Path) -> RunConfig:
    """The settings of the measurement, from the manifest beside the statistics of a run."""
    try:
        manifest = manifest_at(file)
    except ConfigurationError as error:
        raise ManifestError(
            f"{file}: its model and settings are unknown; give the directory that layerlens run or plan.save wrote, or "
            "the file of profile.save"
        ) from error
    return config_of(read_manifest(manifest))
