"""``evaluate``: a study of allocations, or predictions compared with measurements.

``calibrate`` measures the device that predictions are for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerlens.cli import output
from layerlens.cli.commands_run import do, load
from layerlens.cli.errors import guarded
from layerlens.cli.places import Debug, Json, Output, Quiet, Set, TrustRemoteCode, base_dir_of
from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    from rich.table import Table

    from layerlens.evaluation.from_config import StudyResult
    from layerlens.jobs.costs import Comparison
    from layerlens.jobs.evaluated_costs import EvaluatedCosts
    from layerlens.models import Manifest

NAMES = {
    "trainable_params": "trainable parameters",
    "flops": "FLOPs of a forward pass",
    "step_memory_gb": "peak memory of a training step",
    "step_memory_above_weights_gb": "of it above weights and optimiser",
    "step_ms": "time of a training step",
    "forward_ms": "of it forward pass and loss",
    "backward_ms": "of it backward pass",
    "optimizer_ms": "of it optimiser",
}
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all cores.")]
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", help="Directory of the device profile.")]


@guarded("finished runs are kept; run the command again to continue")
def evaluate(
    subject: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG|MANIFEST", help="A study's configuration; with --costs, a manifest.", show_default=False
        ),
    ],
    costs: Annotated[
        bool,
        typer.Option(
            "--costs", help="Compare a manifest's predicted parameters, FLOPs, memory and time with measurements."
        ),
    ] = False,
    directory: Output = None,
    settings: Set = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model, if it is not where the manifest says.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples in the batch; as in the run's latency profile when not given.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a sequence; as in the run's latency profile when not given.")
    ] = None,
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Measure the device again first.")] = False,
    threads: Threads = 0,
    cache_dir: CacheDir = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train several allocations with tuned learning rates on paired seeds, and show which wins on your data.

    With --costs: compare a manifest's predictions with measurements on the model.
    """
    if not costs:
        for name, given in {"--model": model, "--batch-size": batch_size, "--sequence-length": sequence_length}.items():
            if given is not None:
                raise ConfigurationError(f"{name} goes with --costs; a study takes it from its configuration")
        if subject.suffix == ".json":
            raise ConfigurationError(f"{subject} is not a configuration; to evaluate a manifest's costs, give --costs")
        return _study(subject, directory, settings, json=json, quiet=quiet)
    if directory is not None or settings:
        raise ConfigurationError(
            "--output and --set go with a study; --costs writes nothing and reads no configuration"
        )
    from layerlens.manifest import read_manifest

    manifest = subject
    plan = read_manifest(manifest)
    sizes = _sizes(plan, batch_size, sequence_length)
    from layerlens.jobs.costs import device_profile
    from layerlens.jobs.evaluated_costs import evaluate_costs
    from layerlens.utils.threads import set_threads

    set_threads(threads)

    def job(progress: Any, warn: Any) -> EvaluatedCosts:
        profile = device_profile(_cache(cache_dir), recalibrate=recalibrate, progress=progress)
        return evaluate_costs(
            plan,
            model=model,
            base_dir=Path.cwd(),  # where `layerlens show` and `train` look for the model too
            measured_factors=manifest.parent / "peft",
            profile=profile,
            batch_size=sizes[0],
            sequence_length=sizes[1],
            trust_remote_code=trust_remote_code,
            progress=progress,
            warn=warn,
        )

    result = do(job, quiet)
    if json:
        output.json_result(_as_json(result))
    elif not quiet:
        _show(result, sizes)


@guarded()
def calibrate(
    threads: Threads = 0, cache_dir: CacheDir = None, json: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Measure this device, save the figures, and print them as a latency profile for configurations."""
    from layerlens.config import LatencyProfile
    from layerlens.cost.device import profile_path
    from layerlens.jobs.costs import device_profile
    from layerlens.utils.threads import set_threads

    set_threads(threads)
    profile = do(lambda progress, warn: device_profile(_cache(cache_dir), recalibrate=True, progress=progress), quiet)
    figures = profile.latency_profile(LatencyProfile())
    chosen = {name: getattr(figures, name) for name in ("peak_gflops", "memory_bandwidth_gb_s", "op_overhead_us")}
    if json:
        from dataclasses import asdict

        output.json_result({**asdict(profile), "latency_profile": chosen, "file": profile_path(_cache(cache_dir))})
        return
    if not quiet:
        where = output.short(profile_path(_cache(cache_dir)))
        output.note(f"Measured {profile.device} with {profile.threads} threads; kept in {where}.")
        errors = (f"{kind} {100 * error:.0f} %" for kind, error in profile.fit_error.items())
        output.note(f"Median errors of the fit: {', '.join(errors)}.")
    numbers = ", ".join(f"{name}: {value:.4g}" for name, value in chosen.items())
    output.result(f"latency_profile: {{{numbers}}}")


def _cache(given: Path | None) -> Path:
    from layerlens.utils.places import default_cache_dir

    return given or default_cache_dir()


def _sizes(plan: Manifest, batch_size: int | None, sequence_length: int | None) -> tuple[int, int]:
    """Batch size and sequence length: as given, else those that the run predicted for."""
    from layerlens.config import LatencyProfile

    optimization = (plan.provenance.config or {}).get("optimization", {})
    profile = optimization.get("latency_profile", {}) if isinstance(optimization, dict) else {}
    default = LatencyProfile()
    found = []
    for name, given in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        value = given or profile.get(name, getattr(default, name))
        found.append(int(value))
    return found[0], found[1]


def _as_json(result: EvaluatedCosts) -> dict[str, Any]:
    def fields(found: dict[str, Comparison], parts: dict[str, float] | None) -> dict[str, Any]:
        compared = {
            name: {"predicted": each.predicted, "measured": each.measured, "relative_error": each.relative_error}
            for name, each in found.items()
        }
        return compared | {name: {"measured": measured} for name, measured in (parts or {}).items()}

    other = result.uniform_lora
    return {
        **fields(result.choice, result.parts),
        "uniform_lora": None if other is None else fields(other, result.uniform_parts),
    }


def _show(result: EvaluatedCosts, sizes: tuple[int, int]) -> None:
    console = output.console()
    console.print(_table(f"Costs of {sizes[0]} × {sizes[1]} tokens", result.choice, result.parts))
    if result.uniform_lora is not None:
        console.print(
            _table("Uniform LoRA with the same number of parameters", result.uniform_lora, result.uniform_parts or {})
        )
        output.note(_beside(result.choice, result.uniform_lora))


def _table(title: str, found: dict[str, Comparison], parts: dict[str, float]) -> Table:
    from layerlens.cli.output import amount
    from layerlens.cli.tables import new_table

    table = new_table(title)
    table.add_column("")
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, each in found.items():
        kind = "vram_gb" if name.endswith("_gb") else name
        error = f"{100 * each.relative_error:+.1f} %"
        table.add_row(NAMES[name], amount(kind, each.predicted), amount(kind, each.measured), error)
    for name, measured in parts.items():
        table.add_row(NAMES[name], "", amount("step_ms", measured), "")
    return table


def _beside(own: dict[str, Comparison], other: dict[str, Comparison]) -> str:
    """What the choice saves beside uniform LoRA, predicted and measured."""

    def saved(name: str) -> str:
        shares = []
        for kind in ("predicted", "measured"):
            share = 1.0 - getattr(own[name], kind) / getattr(other[name], kind)
            shares.append(f"{abs(share):.0%} {'less' if share >= 0.0 else 'more'} {kind}")
        return ", ".join(shares)

    return f"Beside it, the choice takes: time a step {saved('step_ms')}; memory {saved('step_memory_gb')}."


def _study(config: Path, directory: Path | None, settings: list[str] | None, *, json: bool, quiet: bool) -> None:
    """Train several allocations with tuned learning rates on paired seeds, and show which wins on the data."""
    checked = load(config, settings, directory)
    from layerlens.evaluation.from_config import evaluate_config

    result = do(
        lambda progress, warn: evaluate_config(checked, base_dir=base_dir_of(config), progress=progress, warn=warn),
        quiet,
    )
    if json:
        from dataclasses import asdict

        output.json_result(asdict(result))
    elif not quiet:
        _show_study(result)


def _show_study(result: StudyResult) -> None:
    from layerlens.cli.tables import new_table

    console = output.console()
    for budget in dict.fromkeys(row["budget"] for row in result.arms):
        rows = sorted((row for row in result.arms if row["budget"] == budget), key=lambda row: row["test_loss"])
        table = new_table(f"Budget {budget}")
        for name in ("arm", "parameters", "learning rate", "test loss", "right"):
            table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
        for row in rows:
            table.add_row(
                row["arm"], f"{row['params']:,}", f"{row['learning_rate']:g}", f"{row['test_loss']:.4f}",
                f"{row['test_metric']:.1%}",
            )  # fmt: skip
        console.print(table)
    for path in result.files.values():
        console.print(f"  {output.short(path)}", soft_wrap=True)
