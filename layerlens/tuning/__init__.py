"""From a manifest to a model that trains: injection of LoRA, adapters and prefixes, and the adapter directory.

Nothing here imports torch before it is called, so the command line can show its help at once.
"""

from layerlens.tuning.export import apply_to_directory, export_adapter
from layerlens.tuning.inject import apply
from layerlens.tuning.storage import load_modules, save_modules

__all__ = ["apply", "apply_to_directory", "export_adapter", "load_modules", "save_modules"]
