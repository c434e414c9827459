"""The last stage: manifest, adapter directory, statistics and report, all of them or none."""

from __future__ import annotations

from typing import Any

import numpy as np

from layerlens.engines import read_otherwise
from layerlens.integrations.ctc_vocabulary import save_vocabulary
from layerlens.jobs.decision import Decision
from layerlens.jobs.files import Writing, now
from layerlens.jobs.job import Job
from layerlens.jobs.load import Loaded
from layerlens.jobs.measure import Measured, fit_new_head
from layerlens.jobs.result import STATISTICS_FILE
from layerlens.manifest import write_manifest
from layerlens.models import Choice
from layerlens.profiling.head import head_arrays
from layerlens.profiling.statistics_file import statistics_to_bytes
from layerlens.tuning import export_adapter
from layerlens.tuning.export import PEFT_DIRECTORY
from layerlens.tuning.initialization import beginnings_unmeasured, measured_factors
from layerlens.tuning.task_head import write_head
from layerlens.utils.atomic import atomic_write_bytes


def _trained_head(loaded: Loaded) -> dict[str, np.ndarray]:
    """The trained task head of a checkpoint whose weights stay on disk; nothing where the model has it."""
    pretrained = loaded.pretrained
    if pretrained.streamed is None or not loaded.task.new_head:
        return {}
    return head_arrays(pretrained.model, pretrained.trained_modules(), pretrained.streamed)


def export(job: Job, loaded: Loaded, measured: Measured, decision: Decision, written: Writing) -> Any:
    """Write manifest, adapter and statistics; LoRA's first A by layer, where it is measured."""
    manifest, model = decision.manifest, loaded.pretrained.model
    with job.clock.stage("export"):
        factors = measured_factors(
            model, manifest.choice, loaded.batches, loaded.task.loss, lambda: fit_new_head(job, loaded)
        )
        if unmeasured := beginnings_unmeasured(model, manifest.choice):
            job.warnings.add(unmeasured)
        written.files |= write_manifest(manifest, written.directory, created_at=now())
        head = measured.statistics.head
        trained = head or _trained_head(loaded)
        written.files |= export_adapter(manifest, model, written.directory, factors, head=trained)
        if (peft := written.directory / PEFT_DIRECTORY).is_dir():
            save_vocabulary(loaded.pretrained, peft)
        written.files |= write_head(head, written.directory)
        _tell_of_serving(job, manifest.choice)
        written.files["statistics"] = atomic_write_bytes(
            written.directory / STATISTICS_FILE, statistics_to_bytes(measured.spec, measured.statistics)
        )
    return factors


def _tell_of_serving(job: Job, choice: Choice) -> None:
    """rsLoRA of several ranks is the one case in which even an engine of one scale for the file is wrong."""
    if not choice.lora.use_rslora or choice.head_modules:
        return
    wrong = read_otherwise(choice.lora.alpha_over_r or 1.0, choice.lora_ranks(), rslora=True)
    if wrong:
        job.warnings.add(
            f"optimization.use_rslora: {', '.join(wrong)} scale layers of lower rank in peft/ differently from PEFT; "
            "after training, export for them with `layerlens export --serve ENGINE`"
        )
