"""The documentation site builds without a warning, which MkDocs gives for every dead internal link and missing page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / "mkdocs.yml"), "-d", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_site_builds_without_a_warning_and_asks_no_other_host(tmp_path: Path):
    built = build(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    statistics = (tmp_path / "site/concepts/statistics/index.html").read_text(encoding="utf-8")
    assert "<math" in statistics  # formulas need no script
    assert "arithmatex" not in statistics
    for page in (tmp_path / "site").rglob("*.html"):
        for tag in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http'):
            assert tag not in page.read_text(encoding="utf-8"), f"{page}: {tag}"


def test_a_dead_link_is_noticed(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("[gone](gone.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nvalidation: {links: {not_found: warn}}\n")
    assert build(tmp_path, tmp_path / "site").returncode != 0
