"""``open``: which report it finds, what it does without a browser; and what the program says to misspelt commands."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest
from cli_support import Invoke


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: found.append(address) is None)
    return found


def test_the_report_of_a_directory_a_manifest_and_itself(invoke: Invoke, opened: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    report = tmp_path / "out/report.html"
    report.write_text("<p>found</p>", encoding="utf-8")
    for place in ((), ("out",), ("out/manifest.json",), ("out/report.html",)):
        result = invoke("open", *place)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "Opened out/report.html\n")
    assert opened == [report.as_uri()] * 4
    printed = invoke("open", "out", "--print")
    assert (printed.stdout, len(opened)) == ("out/report.html\n", 4)


def test_without_a_browser_the_address_is_shown(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_address: str) -> bool:
        raise webbrowser.Error("no browser")

    (tmp_path / "report.html").touch()
    for failing in (refuse, lambda _address: False):
        monkeypatch.setattr(webbrowser, "open", failing)
        result = invoke("open", ".")
        assert result.exit_code == 0
        assert f"Open this address in one: {(tmp_path / 'report.html').as_uri()}" in result.stderr


def test_no_report(invoke: Invoke, opened: list[str]) -> None:
    result = invoke("open", "nowhere")
    assert (result.exit_code, opened) == (2, [])
    assert result.stderr.startswith("error: nowhere: no such file or directory; give the directory that `layerlens")
    result = invoke("open", ".")
    assert (result.exit_code, opened) == (2, [])
    assert result.stderr.startswith("error: report.html: no such file; give the directory that `layerlens run`")


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("optimise", "optimize"), ("shwo", "show")])
def test_a_misspelt_command_is_told_the_nearest(invoke: Invoke, typed: str, meant: str) -> None:
    result = invoke(typed, "out")
    assert result.exit_code == 2
    assert f"Did you mean '{meant}'" in result.stderr


def test_choosing_again_is_one_command(invoke: Invoke) -> None:
    for wrong, words in (
        (("--sweep", "flops=1", "--frontier", "flops"), "--sweep chooses at the budgets that it lists"),
        (("--at", "20k"), "give --frontier RESOURCE too"),
    ):
        result = invoke("optimize", "out", *wrong)
        assert result.exit_code == 2
        assert words in result.stderr
