"""``show`` (also ``apply``) and ``diff``: what a manifest chose and why, its code, and how two choices differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.places import Debug, Json, TrustRemoteCode

if TYPE_CHECKING:
    from layerlens.models import Manifest

UNIFORM = "uniform-lora"
MORE_LEFT_OUT = 8

Place = Annotated[
    Path,
    typer.Argument(metavar="MANIFEST|DIRECTORY", help="A manifest, or the directory with one.", show_default=False),
]
APPLY = "apply"
"""The other name of ``show``, which shows the code too."""


@guarded("the output directory is unchanged")
def show(
    context: typer.Context,
    place: Place,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            "-l",
            help="Explain the choice for this layer: its options, the runner-up, and what would make it win.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Statistics for --layer; those beside the manifest when not given.")
    ] = None,
    code: Annotated[
        bool, typer.Option("--code", help="Print the Python code that loads the model with the choice to stdout.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Base model (directory, hub name or package:NAME), if not the manifest's."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Add the choice to the model, and write its adapter directory here."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a manifest's choice, its use of each budget and its proof; or its code, or the reasons for one layer.

    `layerlens apply` is the same command, and always shows the code.
    """
    from layerlens.jobs.recorded import manifest_at

    path = manifest_at(place)
    if layer is not None:
        _show_layer(path, layer, statistics or path, json)
        return
    from layerlens.manifest import read_document

    manifest, created_at = read_document(path)
    files = {} if directory is None else _written(manifest, path, directory, model, trust_remote_code)
    code = code or context.info_name == APPLY or directory is not None
    snippet = _snippet(manifest, path, files, model) if code else ""
    if json:
        more = {"files": files, "python": snippet} if code else {}
        output.json_result({"manifest": path, "created_at": created_at, **manifest.fields(), **more})
        return
    _show_manifest(manifest, created_at, path)
    for file in files.values():
        output.note(f"Wrote {output.short(file)}")
    if code:
        output.note("In Python:\n")
        output.result(snippet)


def _written(
    manifest: Manifest, path: Path, directory: Path, model: str | None, trust_remote_code: bool
) -> dict[str, Path]:
    """The adapter directory of a manifest, written for its model."""
    from layerlens import tuning
    from layerlens.cli.places import output_directory, published_files
    from layerlens.exceptions import ManifestError

    with output_directory(directory) as local:
        try:
            files = tuning.apply_to_directory(
                manifest, model, local, path.parent / "peft", trust_remote_code=trust_remote_code
            )
        except ManifestError as error:
            raise type(error)(f"{output.short(path)}: {error}") from error
    return published_files(files, local, directory)


def _snippet(manifest: Manifest, path: Path, files: dict[str, Path], model: str | None) -> str:
    from layerlens.tuning.recipes import python_snippet

    peft = files.get("peft", path.parent / "peft")
    return python_snippet(manifest, path, peft if peft.is_dir() else None, model, named=output.short)


@guarded()
def diff(
    first: Annotated[
        Path, typer.Argument(metavar="FIRST", help="A manifest, or the directory with one.", show_default=False)
    ],
    second: Annotated[
        Path,
        typer.Argument(
            metavar="SECOND",
            help=f"Another; or {UNIFORM}:RANK, or {UNIFORM} for the largest rank that fits the budgets of FIRST.",
            show_default=False,
        ),
    ],
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if they differ, as git diff does.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two choices: layers, parameters, FLOPs, memory, latency, score, model and data."""
    from layerlens.jobs.recorded import manifest_at
    from layerlens.manifest import read_manifest
    from layerlens.manifest.difference import Difference

    path = manifest_at(first)
    manifest = read_manifest(path)
    name, _, rank = str(second).partition(":")
    other = _uniform(path, manifest, rank) if name == UNIFORM else read_manifest(manifest_at(second))
    found = Difference.of(manifest, other, (output.short(first), output.short(second)))
    if json:
        output.json_result(found.to_dict())
    else:
        output.note(str(found))
    if exit_code and found:
        raise typer.Exit(1)


def _uniform(path: Path, manifest: Manifest, rank: str) -> Manifest:
    from layerlens.exceptions import ConfigurationError
    from layerlens.jobs.compared import uniform_manifest
    from layerlens.jobs.recorded import statistics_at
    from layerlens.profiling.statistics_file import load_statistics

    if rank and not (rank.isdecimal() and int(rank)):
        raise ConfigurationError(f"{UNIFORM}:{rank}: the rank must be a whole number above 0, such as {UNIFORM}:8")
    return uniform_manifest(manifest, *load_statistics(statistics_at(path)), int(rank) if rank else None)


def _show_layer(path: Path, layer: str, statistics: Path, json: bool) -> None:
    from dataclasses import asdict

    from layerlens.jobs.explained import explained, solution_of
    from layerlens.jobs.recorded import statistics_at
    from layerlens.manifest import read_manifest
    from layerlens.manifest.frozen import why_no_deeper
    from layerlens.profiling.statistics_file import load_statistics

    manifest = read_manifest(path)
    left_out = manifest.model.left_out or {}
    if layer in left_out:
        told = f"{layer} is not offered any option: {left_out[layer]}."
        output.json_result({"layer": layer, "left_out": left_out[layer]}) if json else output.note(told)
        return
    spec, found = load_statistics(statistics_at(statistics))
    solution = solution_of(manifest, spec, found)
    told_of = explained(solution, layer)
    if json:
        output.json_result({**told_of.to_dict(), "frozen_stages": [asdict(stage) for stage in solution.frozen]})
        return
    output.note(str(told_of))
    if sentence := why_no_deeper(manifest, solution.frozen):
        output.note(sentence)


def _show_manifest(manifest: Manifest, created_at: str, path: Path) -> None:
    from rich.text import Text

    from layerlens.cli.tables import budgets, calibration, certificate, chosen
    from layerlens.manifest.summary import score_in_words

    console, model = output.console(), manifest.model
    data = manifest.provenance.statistics or {}
    facts = [model.name_or_path or "an unnamed model", model.task, model.dtype]
    counted = data.get("calibration_samples", "?")
    facts.append(f"measured on {counted} samples of {data['source']}" if "source" in data else None)
    console.print(Text(", ".join(fact for fact in facts if fact)), soft_wrap=True)
    version = (manifest.provenance.versions or {}).get("layerlens")
    console.print(Text(f"written {created_at}" + (f" by LayerLens {version}" if version else ""), style="dim"))
    console.print()
    for part in (chosen(manifest), budgets(manifest.resources), certificate(manifest), calibration(manifest.predicted)):
        if part is not None:
            console.print(part)
            console.print()
    for line in (score_in_words(manifest), *_remarks(manifest)):
        if line:
            output.note(line)
    layer = next((row.layer for row in manifest.allocations if row.method != "none"), None)
    if layer is not None:
        command = output.command("show", output.short(path), "--layer", layer)
        console.print(Text.assemble("Why a layer got its option: ", (command, "bold")), soft_wrap=True)


def _remarks(manifest: Manifest) -> list[str]:
    """Layers that no method can adapt, and what else the run recorded."""
    left_out, provenance = manifest.model.left_out or {}, manifest.provenance
    said = [f"Left out: {layer}: {reason}." for layer, reason in list(left_out.items())[:MORE_LEFT_OUT]]
    if len(left_out) > MORE_LEFT_OUT:
        said.append(f"Left out: {len(left_out) - MORE_LEFT_OUT} more layers (--json lists them).")
    if provenance.memory_mode:
        said.append(f"Profiled {provenance.memory_mode}: {provenance.memory_mode_why}.")
    if provenance.proxy_check:
        said.append(f"Proxy check: {provenance.proxy_check.get('chosen', 'the solver’s choice')} was written.")
    return said
