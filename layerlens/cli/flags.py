"""Options that say in a few words what a configuration file says: ``--model M --data D --max-params 300k``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    from layerlens.config.loader import Setting

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model directory, hub name, package:NAME, timm:NAME ...", show_default=False),
]
Data = Annotated[
    str | None,
    typer.Option("--data", "-d", help="Data file or folder, hf:NAME, builtin:NAME ...", show_default=False),
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", "-t", help="Task; guessed from the model and the data if not given.", show_default=False),
]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="PEFT method on offer; repeatable.", show_default=False)
]
MaxParams = Annotated[
    str | None, typer.Option("--max-params", help="Budget of trainable parameters: 300k, 1.5M.", show_default=False)
]
MaxVram = Annotated[
    str | None, typer.Option("--max-vram", help="Memory of a training step: 8GB, 512MB.", show_default=False)
]
MaxFlops = Annotated[
    str | None, typer.Option("--max-flops", help="Added FLOPs of a forward pass: 80M, 1.5G.", show_default=False)
]
MaxLatency = Annotated[
    str | None, typer.Option("--max-latency", help="Forward latency of a batch: 20ms, 0.5s.", show_default=False)
]
MaxStep = Annotated[
    str | None, typer.Option("--max-step", help="Time of a training step: 250ms, 1.5s.", show_default=False)
]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="score: the best score within the budgets; cheapest: the lowest step time (or optimization.minimise) that "
        "is predicted to match uniform LoRA.",
        show_default=False,
    ),
]
QualityMargin = Annotated[
    str | None,
    typer.Option(
        "--quality-margin",
        help="With --objective cheapest: share of uniform LoRA's predicted improvement that the choice may lose; 0.05 "
        "when not given.",
        show_default=False,
    ),
]
OptionalConfig = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG",
        help="Configuration file (YAML); not needed with --model, --data and a budget.",
        show_default=False,
    ),
]
KEYS = {
    "--model": "model.name_or_path",
    "--data": "data.source",
    "--task": "model.task",
    "--method": "optimization.methods",
    "--max-params": "optimization.max_trainable_params",
    "--max-vram": "optimization.max_vram_gb",
    "--max-flops": "optimization.max_flops",
    "--max-latency": "optimization.latency_target_ms",
    "--max-step": "optimization.max_step_ms",
    "--objective": "optimization.objective",
    "--quality-margin": "optimization.quality_margin",
}
NEEDED = {"--model": ("model.name_or_path", "model.factory"), "--data": ("data.source",)}
BUDGETS = tuple(option for option in KEYS if option.startswith("--max-"))
EXAMPLE = "layerlens run --model DIRECTORY --data FILE --max-params 300k"


def given_options(
    model: str | None, data: str | None, task: str | None, methods: Sequence[str] | None, max_params: str | None,
    max_vram: str | None, max_flops: str | None, max_latency: str | None,
    max_step: str | None, objective: str | None = None, quality_margin: str | None = None,
) -> dict[str, str | list[str]]:  # fmt: skip
    """The options that were given, by name."""
    said = (model, data, task, list(methods or ()) or None, max_params, max_vram, max_flops, max_latency, max_step,
            objective, quality_margin)  # fmt: skip
    return {option: value for option, value in zip(KEYS, said, strict=True) if value is not None}


def all_settings(
    config: Path | None, options: dict[str, str | list[str]], settings: Sequence[str] | None
) -> list[Setting | str]:
    """What replaces the settings of a file, or stands for all of them: options first, then ``--set``.

    Places that are typed are relative to here, those of a file to its folder.

    Raises:
        ConfigurationError: there is no file, and the options do not say enough.
    """
    from layerlens.config.loader import Setting

    settings = list(settings or ())
    if config is None:
        _refuse_too_little(options, {setting.partition("=")[0].strip() for setting in settings})
    found = []
    for option, value in options.items():
        if config is not None and option in NEEDED and isinstance(value, str) and Path(value).expanduser().exists():
            value = str(Path(value).expanduser().absolute())
        found.append(Setting(KEYS[option], value, f"{option} {value if isinstance(value, str) else ' '.join(value)}"))
    return [*found, *settings]


def _refuse_too_little(options: dict[str, str | list[str]], keys: set[str]) -> None:
    missing = [option for option, names in NEEDED.items() if option not in options and not keys.intersection(names)]
    if not any(option in options or KEYS[option] in keys for option in BUDGETS):
        missing.append("a budget such as --max-params 300k")
    if missing and not options and not keys:
        raise ConfigurationError(f"nothing to do: give a configuration file, or options: {EXAMPLE}")
    if missing:
        raise ConfigurationError(f"without a configuration file, give {' and '.join(missing)} too: {EXAMPLE}")
