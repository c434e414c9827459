"""No file has the marks of an unfinished merge."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENDINGS = (".md", ".py", ".yaml", ".toml", ".cpp", ".pyx")
MARK = re.compile(r"^(<{7} |>{7} )", re.MULTILINE)


def test_no_file_has_the_marks_of_an_unfinished_merge():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = (ROOT / name for name in listed.split("\0") if name.endswith(ENDINGS))
    assert [str(path.relative_to(ROOT)) for path in texts if MARK.search(path.read_text(encoding="utf-8"))] == []
