"""``export``: a manifest for the trainer that the user already has."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.parameters import Debug, Json
from layerlens.exceptions import ManifestError


class ToolName(str, Enum):
    """The trainers on offer; ``layerlens.tuning.tools`` knows what each can hold."""

    peft = "peft"
    trl = "trl"
    axolotl = "axolotl"
    llama_factory = "llama-factory"
    adapterhub = "adapterhub"


@guarded("the output directory is as it was")
def export(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="manifest.json or manifest.yaml of a run.", show_default=False)
    ],
    tool: Annotated[ToolName, typer.Option("--to", help="The trainer that will read it.")],
    directory: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for the files; one beside the manifest.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model, if it is not where the manifest says.")
    ] = None,
    lora_part: Annotated[
        bool, typer.Option("--lora-part", help="Leave adapters and prefixes out instead of refusing them.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what another trainer starts from; refuses, by name, what that trainer cannot hold."""
    from layerlens.manifest import read_manifest

    plan = read_manifest(manifest)
    from layerlens.cli.places import output_directory, published_files
    from layerlens.tuning.tools import export_for

    target = directory or manifest.parent / tool.value
    with output_directory(target) as local:
        try:
            files = export_for(tool.value, plan, model, local, lora_part=lora_part, measured=manifest.parent / "peft")
        except ManifestError as error:
            raise type(error)(f"{output.short(manifest)}: {error}") from error
    files = published_files(files, local, target)
    if json:
        output.json_result({"tool": tool.value, "directory": target, "files": files})
        return
    for path in files.values():
        output.note(f"Wrote {output.short(path)}")
