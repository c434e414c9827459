"""What a folder has in place of a model that loads: the end of a message that says what to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

ADAPTER = "adapter_config.json"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "model._orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "Lightning",
}
"""What wrappers of models put before the names of weights that are saved from within them."""
MOST_SHOWN = 3


def no_configuration(folder: Path) -> str:
    """What to do about a folder without a config.json."""
    if (folder / ADAPTER).is_file():
        base = ""
        try:
            said = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
            base = f" of {said}" if said else ""
        except (OSError, ValueError, AttributeError, RecursionError):
            pass  # which base it has is then not said
        return (
            f"is a PEFT adapter{base}, not a model; give the base model, or merge the adapter into it first "
            "(AutoPeftModel...from_pretrained(folder).merge_and_unload().save_pretrained(...)) and give the result"
        )
    found = _weights(folder)
    if found and all(name.endswith(".gguf") for name in found):
        return (
            f"has GGUF files only ({_shown(found)}), which are for inference; give the directory that they were made "
            "from (config.json and safetensors)"
        )
    return "has no config.json; give the directory of a transformers model (what save_pretrained writes)"


def other_weights(folder: Path) -> str:
    """The files of weights in a folder that transformers found none in, as the end of a message; "" for none."""
    found = _weights(folder)
    if not found:
        return ""
    if all(name.endswith(".gguf") for name in found):
        return f"; it has GGUF files only ({_shown(found)}), which are for inference; give what they were made from"
    return f"; it has {_shown(found)}: rename or convert them to model.safetensors"


def no_tokenizer(folder: Path) -> bool:
    """Whether a folder has no file of a tokenizer."""
    names = ("tokenizer", "vocab.", "spiece.", "sentencepiece.", "merges.", "source.spm")
    return folder.is_dir() and not any(path.name.startswith(names) for path in folder.iterdir())


def names_apart(unknown: Iterable[str]) -> str:
    """What a checkpoint that lacks weights has beside them, such as all under a wrapper's names; "" for nothing."""
    others = sorted(unknown)
    for prefix, wrapper in WRAPPERS.items():
        if others and all(name.startswith(prefix) for name in others):
            return (
                f"; its {len(others)} other weights begin with {prefix}, as {wrapper} names them: save the model from "
                "inside the wrapper, or rename them"
            )
    return f"; it has {len(others)} weights that the model has no place for ({others[0]} ...)" if others else ""


def _weights(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHTS and path.is_file())
    except OSError:
        return []


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_SHOWN]) + f" and {len(names) - MOST_SHOWN} more" * (len(names) > MOST_SHOWN)
