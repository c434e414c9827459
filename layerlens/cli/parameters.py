"""Options that several commands share, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file (YAML).", show_default=False)]
ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="Configuration file (YAML) with the budgets.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Show for every layer the runner-up and what would make it win."),
]
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON to stdout, and no tables.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory for the results, instead of the configuration's.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]
Statistics = Annotated[
    Path, typer.Argument(metavar="STATISTICS", help="statistics.safetensors of an earlier run.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a setting, such as optimization.max_trainable_params=20000; repeatable."),
]
