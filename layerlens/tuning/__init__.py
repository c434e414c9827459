"""From a manifest to a model that trains: adds LoRA, adapters and prefixes, and writes the adapter directory.

No module here imports torch before it is called, so the command line shows its help without delay.
"""

from layerlens.tuning.directory import load, save
from layerlens.tuning.export import apply_to_directory, export_adapter
from layerlens.tuning.initialization import CalibrationBatch, initial_factors, read_factors
from layerlens.tuning.inject import apply, merge, unapply
from layerlens.tuning.storage import load_modules, save_modules
from layerlens.tuning.task_head import read_head

__all__ = [
    "CalibrationBatch",
    "apply",
    "apply_to_directory",
    "export_adapter",
    "initial_factors",
    "load",
    "load_modules",
    "merge",
    "read_factors",
    "read_head",
    "save",
    "save_modules",
    "unapply",
]
