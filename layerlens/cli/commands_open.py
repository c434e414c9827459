"""``open``: the report of a run or of a training, in the browser."""

from __future__ import annotations

import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.places import Debug
from layerlens.exceptions import ConfigurationError

REPORT = "report.html"
MOST_BYTES = 64 << 20


@guarded()
def open_report(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="DIRECTORY|MANIFEST|REPORT",
            help="Directory of a run or training, its manifest, or a report.",
            show_default=False,
        ),
    ] = Path("out"),
    only_path: Annotated[
        bool, typer.Option("--print", help="Print the report's path to stdout instead of opening it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Open the report of a run or training in the browser (default: out/report.html)."""
    report = _report_at(place)
    if only_path:
        output.result(str(report))
        return
    address = report.absolute().as_uri()
    if _shown(address):
        output.note(f"Opened {output.short(report)}")
    else:
        output.note(f"No browser was found here. Open this address in one: {address}")


def _report_at(place: Path) -> Path:
    """The report that ``place`` names, as a local file.

    Raises:
        ConfigurationError: there is none.
    """
    from layerlens.storage import joined, local_or_url, read_text

    path, url = local_or_url(place)
    if url is not None:
        folder = url.rpartition("/")[0] if path.suffix in (".json", ".yaml", ".yml") else url
        text = read_text(url if path.suffix == ".html" else joined(folder, REPORT), MOST_BYTES)
        local = Path(tempfile.mkdtemp(prefix="layerlens-")) / REPORT  # the browser reads it after this program's end
        local.write_text(text, encoding="utf-8")
        return local
    beside = path if path.is_dir() else path.parent
    report = path if path.suffix == ".html" else beside / REPORT
    if not path.exists() and not (path.suffix and report.is_file()):
        raise ConfigurationError(
            f"{output.short(path)}: no such file or directory; give the directory that `layerlens run` or "
            "`layerlens train` wrote"
        )
    if not report.is_file():
        raise ConfigurationError(
            f"{output.short(report)}: no such file; give the directory that `layerlens run` or `layerlens train` wrote"
        )
    return report


def _shown(address: str) -> bool:
    """Whether a browser took the address."""
    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False
