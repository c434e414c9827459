#!/usr/bin/env python3
"""Opens a report in headless Chromium as people will: on a desk, on a phone, in the dark, on paper, by keyboard.

    python report_checks.py REPORT.html [--pictures DIRECTORY] [--chromium PROGRAM]

Prints a line for each check and ends with exit code 1 if one fails, 2 where there is no Chromium to check with. Needs
playwright and axe-playwright-python (the test extra has them) and any Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
A4 = {"width": 718, "height": 1047}  # without margins of a centimetre, at 96 px to the inch
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
WIDER = """() => [...document.querySelectorAll('body *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll') && !e.closest('.skip'))
  .map(e => e.tagName + '.' + (e.className.baseVal ?? e.className)).slice(0, 5)"""
FOCUSABLE = """() => [...document.querySelectorAll('a[href], button, summary, [tabindex="0"]')]
  .filter(e => e.checkVisibility()).map((e, i) => e.dataset.stop = String(i)).length"""
SORTED = """() => {
  const heads = [...document.querySelectorAll('#layers-table thead button')];
  const found = heads.map((head, column) => [1, 2].map(() => {
    head.click();
    return [...document.querySelectorAll('#layers-table tbody.flat tr')].map(row => row.cells[column].dataset.v ?? '')
      .map(value => value === '' ? -1e300 : Number(value)); }));
  document.querySelector('#layers-tools button:nth-child(3)')?.click();
  return found; }"""
COLUMN = """name => {
  const head = [...document.querySelectorAll('#layers-table thead th')].find(e => e.textContent.trim() === name);
  return head ? [head.getBoundingClientRect().right, head.closest('.scroll').getBoundingClientRect().right] : null; }"""
FOCUSED = "() => document.activeElement.dataset.stop ?? ''"


def find_chromium() -> str | None:
    """The browser to use: $CHROMIUM, or the first that is on PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


def check_report(report: Path, chromium: str, pictures: Path | None = None) -> Iterator[tuple[str, str]]:
    """(check, what is wrong with the report or ""), for each check."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers have neither a user namespace for the sandbox nor a large /dev/shm; the file is our own.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport=DESK, color_scheme=scheme)
            page = context.new_page()
            said, asked = watch(page)
            page.goto(report.absolute().as_uri())
            yield f"no message on the console, {scheme}", "; ".join(said)
            own = report.absolute().as_uri()
            yield f"no request beside the file itself, {scheme}", "; ".join(url for url in asked if url != own)
            found = Axe().run(page, options={"runOnly": RULES}).response["violations"]
            yield f"axe-core finds nothing, {scheme}", "; ".join(map(violation, found))
            if scheme == "light":
                yield "every link, table and detail is reached by the Tab key", unreachable(page)
                yield "fits a desk's screen", too_wide(page)
                yield "the table of layers sorts by every column", unsorted(page)
                yield "blocks fold and open", not_foldable(page)
                yield "the runner-up is on a desk's screen", hidden_column(page, "Runner-up")
            picture(page, pictures, f"desk-{scheme}")
            page.set_viewport_size(PHONE)
            yield f"fits a phone of {PHONE['width']} px, {scheme}", too_wide(page)
            if scheme == "light":
                yield "the runner-up is on a phone's screen", hidden_column(page, "Runner-up")
            picture(page, pictures, f"phone-{scheme}")
            if scheme == "light":
                page.set_viewport_size(A4)
                page.emulate_media(media="print", color_scheme="dark")
                yield "prints in black on white, whatever the screen's scheme", not_white(page)
                yield "prints what is folded away", folded(page)
                wide = page.evaluate("() => document.documentElement.scrollWidth")
                yield "fits a sheet of A4", f"{wide} px of content on {A4['width']}" if wide > A4["width"] else ""
                if pictures:
                    page.pdf(path=pictures / "print.pdf", format="A4", print_background=False)
            context.close()
        browser.close()


def watch(page: Any) -> tuple[list[str], list[str]]:
    """What the page says on the console, and what it asks for, as it happens."""
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    return said, asked


def violation(found: dict[str, Any]) -> str:
    where = ", ".join(str(node["target"][0]) for node in found["nodes"][:3])
    return f"{found['id']} ({found['impact']}): {found['help']}: {where}"


def too_wide(page: Any) -> str:
    width, inside = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    return f"{width} px of content on {inside}: {page.evaluate(WIDER)}" if width > inside else ""


def unreachable(page: Any) -> str:
    """Everything that can be operated is reached, in the page's order, the link that skips the header first."""
    wanted = [str(stop) for stop in range(page.evaluate(FOCUSABLE))]
    reached = []
    for _ in wanted:
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
    return "" if reached == wanted else f"wanted stops {wanted}, reached {reached}"


def unsorted(page: Any) -> str:
    """Each head of the table of layers sorts it; its figures then fall, and a second time rise."""
    wrong = []
    for place, runs in enumerate(page.evaluate(SORTED)):
        for sign, values in zip((1, -1), runs, strict=True):
            if any(sign * (one - other) < 0 for one, other in pairwise(values)):
                wrong.append(f"column {place}: {values[:8]}")
    return "; ".join(wrong)


def not_foldable(page: Any) -> str:
    buttons = page.query_selector_all("#layers-table .block button")
    if not buttons:
        return ""
    before, wrong = buttons[0].get_attribute("aria-expanded"), []
    for _ in range(2):
        buttons[0].click()
        expanded = buttons[0].get_attribute("aria-expanded")
        shown = page.evaluate("() => document.querySelector('#layers-table tr:nth-child(2)').checkVisibility()")
        if shown != (expanded == "true"):
            wrong.append(f"aria-expanded is {expanded}, and the rows are {'shown' if shown else 'hidden'}")
    if buttons[0].get_attribute("aria-expanded") != before:
        wrong.append("a second click does not undo the first")
    return "; ".join(wrong)


def hidden_column(page: Any, name: str) -> str:
    """Whether the column of this name lies within the table's part of the screen; "" where there is none."""
    found = page.evaluate(COLUMN, name)
    return "" if found is None or found[0] <= found[1] else f"ends at {found[0]:.0f} px of {found[1]:.0f}"


def not_white(page: Any) -> str:
    ground, ink = page.evaluate(
        "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    return "" if (ground, ink) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)") else f"{ink} on {ground}"


def folded(page: Any) -> str:
    hidden = page.evaluate(
        "() => [...document.querySelectorAll('details table')].filter(t => !t.checkVisibility()).length"
    )
    return f"{hidden} tables stay folded" if hidden else ""


def picture(page: Any, pictures: Path | None, name: str) -> None:
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=pictures / f"{name}.png", full_page=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument(
        "--pictures", type=Path, help="write what was seen as PNG, and a print as PDF, into this folder"
    )
    parser.add_argument("--chromium", default=find_chromium(), help="the browser; by default $CHROMIUM or one on PATH")
    arguments = parser.parse_args()
    if not arguments.report.is_file():
        parser.error(f"no report at {arguments.report}")
    if not arguments.chromium:
        print("error: no Chromium; apt-get install chromium, or set CHROMIUM", file=sys.stderr)
        return 2
    failed = 0
    for check, wrong in check_report(arguments.report, arguments.chromium, arguments.pictures):
        print(f"FAIL  {check}: {wrong}" if wrong else f"ok    {check}", flush=True)
        failed += bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
