"""``layerlens export``: what a manifest becomes elsewhere, as files."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.places import Debug, Json, TrustRemoteCode
from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.registry import nearest_name

if TYPE_CHECKING:
    from layerlens.models import Manifest


class ToolName(str, Enum):
    """The trainers on offer, of which ``layerlens.tuning.tools`` knows what each can hold, and llama.cpp's file."""

    peft = "peft"
    trl = "trl"
    axolotl = "axolotl"
    llama_factory = "llama-factory"
    adapterhub = "adapterhub"
    peft_comparison = "peft-comparison"
    gguf = "gguf"


class EngineName(str, Enum):
    """The serving engines on offer; ``layerlens.engines`` knows how each reads an adapter."""

    peft = "peft"
    vllm = "vllm"
    vllm_legacy = "vllm-legacy"
    sglang = "sglang"
    tensorrt_llm = "tensorrt-llm"
    llama_cpp = "llama.cpp"
    ollama = "ollama"
    lorax = "lorax"
    any = "any"


Name = TypeVar("Name", ToolName, EngineName)


def _one_of(names: type[Enum], option: str, help_text: str) -> Any:
    """An option that takes the value of a member. ``_member`` checks it, and suggests the nearest; Typer would not."""
    values = [name.value for name in names]
    return typer.Option(option, help=help_text, metavar=f"<{'|'.join(values)}>", autocompletion=lambda: values)


@guarded("the output directory is unchanged")
def export(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="MANIFEST",
            help="Manifest of a run. With --serve, --merge and --to gguf, also the run's directory or a trained "
            "directory.",
            show_default=False,
        ),
    ],
    tool_name: Annotated[
        str | None, _one_of(ToolName, "--to", "Trainer or suite that will read the files, or gguf.")
    ] = None,
    engine_name: Annotated[str | None, _one_of(EngineName, "--serve", "Engine that will serve the adapter.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the LoRA into the model's weights, and write one checkpoint.")
    ] = False,
    directory: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for the files; beside the manifest when not given.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model, if it is not where the manifest says.")
    ] = None,
    lora_part: Annotated[
        bool, typer.Option("--lora-part", help="Leave adapters and prefixes out instead of refusing them.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Export files for a trainer or a serving engine, or a merged model. Refuses by name what does not fit."""
    from layerlens.cli.places import output_directory, published_files

    tool, engine = _member(ToolName, "--to", tool_name), _member(EngineName, "--serve", engine_name)
    if (tool, engine, merge) in [(None, None, False)] or (engine and (tool or merge)):
        raise ConfigurationError("give one of --to TRAINER, --to gguf, --serve ENGINE and --merge")
    if merge and tool not in (None, ToolName.gguf):
        raise ConfigurationError(f"--merge goes with --to gguf or alone, got --to {tool.value}")
    if merge and lora_part:
        raise ConfigurationError("--merge merges everything, and --lora-part would leave some out; give one of them")
    beside = place if place.is_dir() else place.parent
    target = directory or beside / (f"serve-{engine.value}" if engine else tool.value if tool else "merged")
    plan = manifest_in(place)
    with output_directory(target) as local:
        try:
            if engine is not None:
                from layerlens.tuning.serving import export_served

                files = export_served(engine.value, place, plan, model, local, lora_part=lora_part)
            elif tool is ToolName.gguf:
                from layerlens.tuning.gguf import export_gguf

                files = export_gguf(place, plan, model, local, merged=merge, lora_part=lora_part)
            elif tool is None:
                from layerlens.tuning.merged import export_merged

                files = export_merged(place, plan, model, local, trust_remote_code=trust_remote_code)
            elif plan is None:
                raise ManifestError("has no manifest; trainers start from the manifest of a run")
            else:
                from layerlens.tuning.tools import export_for

                files = export_for(
                    tool.value, plan, model, local, lora_part=lora_part, measured=beside / "peft",
                    trust_remote_code=trust_remote_code,
                )  # fmt: skip
        except ManifestError as error:
            raise type(error)(f"{output.short(place)}: {error}") from error
    precision = precision_of(files.get("config.json")) if merge and tool is None else ""
    files = published_files(files, local, target)
    if json:
        what = {"engine": engine.value} if engine else {"tool": tool.value if tool else "merge"}
        output.json_result({**what, "directory": target, "files": files})
        return
    for path in files.values():
        output.note(f"Wrote {output.short(path)}")
    if precision:
        output.note(f"The merged weights are in {precision}, as the base checkpoint says.")


def _member(names: type[Name], option: str, given: str | None) -> Name | None:
    """The member with the value ``given``; None if the option was not given.

    Raises:
        ConfigurationError: there is no such member; the message lists all and suggests the nearest.
    """
    known = [name.value for name in names]
    if given is None or given in known:
        return None if given is None else names(given)
    nearest = nearest_name(given, known)
    hint = f"; did you mean {nearest}?" if nearest else ""
    raise ConfigurationError(f"{option} {given}: must be one of {', '.join(known)}{hint}")


def precision_of(config: Path | None) -> str:
    """What the configuration of a checkpoint says that its weights are in; "" where it says nothing."""
    from json import loads

    if config is None or not config.is_file():
        return ""
    said = loads(config.read_text(encoding="utf-8"))
    return str(said.get("dtype") or said.get("torch_dtype") or "")


def manifest_in(place: Path) -> Manifest | None:
    """The manifest in a file, or in a directory that has one; None for a directory without."""
    from layerlens.manifest import read_manifest

    if not place.is_dir():
        return read_manifest(place)
    found = next((path for path in (place / "manifest.json", place / "manifest.yaml") if path.is_file()), None)
    return None if found is None else read_manifest(found)
