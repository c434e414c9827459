"""``apply``: what a manifest says and how to use it in Python; with ``--output``, its adapter directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.parameters import Debug, Json
from layerlens.exceptions import ManifestError


@guarded("the output directory is as it was")
def apply(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="manifest.json or manifest.yaml of a run.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Base model (directory, hub name or package:NAME), if not the manifest's."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Inject the plan into the model, and write its adapter directory here."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a manifest's plan and the Python code that uses it; with --output, write its adapter directory."""
    from layerlens.manifest import read_manifest

    plan = read_manifest(manifest)
    files: dict[str, Path] = {}
    if directory is not None:
        from layerlens.cli.places import output_directory, published_files
        from layerlens.tuning import apply_to_directory

        with output_directory(directory) as local:
            try:
                files = apply_to_directory(plan, model, local, manifest.parent / "peft")
            except ManifestError as error:
                raise type(error)(f"{output.short(manifest)}: {error}") from error
        files = published_files(files, local, directory)
    from layerlens.cli.snippets import python_snippet

    peft = files.get("peft", manifest.parent / "peft")
    snippet = python_snippet(plan, manifest, peft if peft.is_dir() else None, model)
    if json:
        output.json_result({"manifest": plan.fields(), "files": files, "python": snippet})
        return
    from layerlens.cli import tables

    console = output.console()
    for part in (tables.chosen(plan), tables.budgets(plan.resources), tables.certificate(plan)):
        console.print(part)
        console.print()
    for path in files.values():
        output.note(f"Wrote {output.short(path)}")
    output.note("In Python:\n")
    output.result(snippet)
