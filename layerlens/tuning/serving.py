"""``layerlens export --serve ENGINE``: a run's, a manifest's or a trained directory as the engine reads it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerlens.engines import Engine
from layerlens.exceptions import LayerLensError, ManifestError
from layerlens.integrations.peft import lora_shape, why_not_adaptable
from layerlens.integrations.transformers import blocks_of
from layerlens.models import Manifest
from layerlens.registry import ENGINES, TASKS
from layerlens.sources import LoadRequest
from layerlens.tuning.export import PEFT_DIRECTORY, apply_to_directory
from layerlens.tuning.initialization import ADAPTER_WEIGHTS
from layerlens.tuning.served import ADAPTER_CONFIG, MERGE, Adapter, read_adapter, read_config, served, server_command
from layerlens.utils.atomic import settle, staged_directory

CARD = "README.md"


@dataclass(frozen=True)
class Origin:
    """What is exported: an adapter, and what is known of its base model.

    Args:
        directory: that has adapter_config.json.
        base: name or path of the base model; "" where nobody says it.
        task: what the model is for.
        manifest: of the run, where there is one.
    """

    directory: Path
    base: str
    task: str
    manifest: Manifest | None = None

    def resolved(self) -> str:
        """The base model as other tools load it; as it is named where it is not found here."""
        request = LoadRequest(self.base)
        try:
            return request.source.resolve(request)
        except LayerLensError:
            return self.base

    def skeleton(self, why: str) -> Any:
        """The base model without its weights.

        Raises:
            ManifestError: nobody says which model it is; ``why`` it is wanted is in the message.
            ModelNotFoundError: it cannot be found.
        """
        if not self.base:
            raise ManifestError(f"{why}, and the base model is not recorded here; pass --model MODEL")
        request = LoadRequest(self.base, self.task)
        return request.source.without_weights(request).model


@contextmanager
def origin_of(place: Path, manifest: Manifest | None, model: str | None) -> Iterator[Origin]:
    """What ``place`` names: a trained directory, a run's directory or its manifest; without an adapter one is made.

    Raises:
        ManifestError: there is neither an adapter nor a manifest with LoRA.
    """
    folder = place if place.is_dir() else place.parent
    settle(folder)
    found = next((path for path in (folder, folder / PEFT_DIRECTORY) if (path / ADAPTER_CONFIG).is_file()), None)
    if found is None and manifest is None:
        raise ManifestError(
            f"has neither {ADAPTER_CONFIG} nor a manifest; give a trained directory, a run's directory or its manifest"
        )
    with tempfile.TemporaryDirectory(prefix="layerlens-") as work:
        if found is None:
            assert manifest is not None
            files = apply_to_directory(manifest, model, Path(work), folder / PEFT_DIRECTORY)
            if "peft" not in files:
                raise ManifestError("the manifest has no LoRA layer, so there is nothing to serve")
            found = files["peft"]
        config = read_config(found)
        base = model or (manifest.model.name_or_path if manifest else None) or config.get("base_model_name_or_path")
        task = (manifest.model.task if manifest else None) or _task_of(config.get("task_type"))
        yield Origin(found, base or "", task, manifest)


def _task_of(peft_type: str | None) -> str:
    return next((name for name in TASKS if peft_type and TASKS[name].peft_type == peft_type), "causal-lm")


def export_served(
    engine_name: str,
    place: Path,
    manifest: Manifest | None,
    model: str | None,
    output: Path,
    *,
    lora_part: bool = False,
) -> dict[str, Path]:
    """Write ``output`` as the engine reads it: PEFT's two files, and a README with the server's command.

    Args:
        engine_name: a key of ``layerlens.registry.ENGINES``.
        place: a trained directory, a run's directory, or its manifest's file.
        manifest: the one that is there, if there is one.
        model: name or path of the base model, if it is not where the adapter says.
        output: directory, created if it is not there; other files in it stay.
        lora_part: leave adapters and prefixes out instead of refusing them.

    Returns:
        The path of each file, by its name.

    Raises:
        ManifestError: the engine cannot hold it (the message names what, and the way out), or it is damaged.
        ModelNotFoundError: the base model's shapes are needed, and it cannot be found.
        OutputError: the directory cannot be written.
    """
    from safetensors.torch import save_file

    engine: Engine = ENGINES[engine_name]
    with origin_of(place, manifest, model) as origin:
        adapter = served_adapter(engine, origin, lora_part=lora_part)
        with staged_directory(output, owned=(ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD)) as staging:
            text = json.dumps(adapter.config, indent=2, sort_keys=True) + "\n"
            (staging / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
            save_file(adapter.tensors(), staging / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            (staging / CARD).write_text(card(engine, origin, adapter), encoding="utf-8")
    return {name: output / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD)}


def served_adapter(engine: Engine, origin: Origin, *, lora_part: bool = False) -> Adapter:
    """The adapter of ``origin`` in the form that ``engine`` reads; see ``served``."""
    adapter = read_adapter(origin.directory)
    if lora_part:
        adapter = replace(adapter, modules=())
    heads = origin.manifest.choice.head_modules if origin.manifest else ()
    if heads and not engine.holds_all:
        raise ManifestError(f"{engine.title} cannot hold the task head {', '.join(heads)}: {MERGE}")
    adapter = replace(adapter, config={**adapter.config, "base_model_name_or_path": origin.resolved() or None})
    if not engine.fuses and not engine.every_block:
        return served(engine, adapter, lambda name: None)
    base = origin.skeleton(f"{engine.title} needs more modules than the adapter has, with shapes from the base model")
    modules = dict(base.named_modules())

    def shape(name: str) -> tuple[int, int] | None:
        module = modules.get(name)
        return None if module is None or why_not_adaptable(name, module) else lora_shape(module)[:2]

    return served(engine, adapter, shape, blocks_of(base))


def card(engine: Engine, origin: Origin, adapter: Adapter) -> str:
    """The README of a served directory."""
    before = read_adapter(origin.directory)
    ranks, added = sorted(set(before.ranks.values())), len(adapter.a) - len(before.a)
    done = [f"ranks {', '.join(map(str, ranks))}" if len(ranks) > 1 else f"rank {ranks[0]}"]
    if engine.as_peft:
        done.append("the files are unchanged")
    else:
        done.append(f"A and B are padded with zeros to rank {adapter.config['r']}")
        done += ["rsLoRA is folded into lora_alpha and B"] if before.config.get("use_rslora") else []
        done += [f"{added} zero modules complete the groups that the engine fuses"] if added else []
    note = f"\n{engine.note}\n" if engine.note else ""
    return f"""---
library_name: peft
base_model: {json.dumps(origin.resolved())}
tags: [lora, layerlens]
---

# LoRA for {engine.title}

{"; ".join(done)}. It computes what PEFT computes with the original: {engine.title} multiplies B·A by
{_formula(engine, adapter.config)} (read in {engine.source}).

```
{server_command(engine, adapter, origin.resolved() or "BASE", "DIRECTORY")}
```

DIRECTORY is the path of this directory.
{note}"""


def _formula(engine: Engine, config: Mapping[str, Any]) -> str:
    if engine.as_peft:
        root = "√r" if config.get("use_rslora") else "r"
        return f"alpha/{root} of each layer"
    return f"lora_alpha/r = {config['lora_alpha']:g}/{config['r']}"
