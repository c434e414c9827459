"""The public surface: the names, their types and documentation, and what importing them costs."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import layerlens

ROOT = Path(__file__).parents[2]
NAMES = [name for name in layerlens.__all__ if name != "__version__"]
MOST_SECONDS = 0.2
SLOW = ("torch", "transformers", "peft", "numpy", "pydantic", "matplotlib", "jinja2", "yaml")


def members() -> list[tuple[str, object]]:
    """Functions that are public, and public methods and properties of classes that are."""
    found: list[tuple[str, object]] = []
    for name in NAMES:
        one = getattr(layerlens, name)
        found.append((name, one))
        if inspect.isclass(one):
            found += [(f"{name}.{key}", part) for key, part in vars(one).items() if not key.startswith("_")]
    return [(name, getattr(part, "__func__", part)) for name, part in found if callable(part) or hasattr(part, "func")
            or isinstance(part, (property, classmethod))]  # fmt: skip


def test_the_page_and_the_stub_list_what_is_public():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: layerlens\.(\w+)$", page, re.MULTILINE), key=str) == sorted(
        [*layerlens.__all__, "exceptions", "kernels"]
    )
    stub = ast.parse((ROOT / "layerlens/__init__.pyi").read_text(encoding="utf-8"))
    imported = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(NAMES)
    assert set(layerlens.__all__) <= set(dir(layerlens))


@pytest.mark.parametrize(("name", "one"), members(), ids=[name for name, _ in members()])
def test_every_public_name_is_typed_and_described(name, one):
    assert inspect.getdoc(one), name
    if inspect.isfunction(one):
        signature = inspect.signature(one)
        assert signature.return_annotation is not signature.empty, name
        given = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        assert all(parameter.annotation is not parameter.empty for parameter in given), name


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example(name):
    one = getattr(layerlens, name)
    texts = [inspect.getdoc(one) or ""]
    if inspect.isclass(one):
        texts += [inspect.getdoc(part) or "" for part in vars(one).values() if inspect.isfunction(part)]
    assert any(">>> " in text for text in texts)
    assert "+SKIP" not in "".join(texts)


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'layerlens' has no attribute 'pan'"):
        layerlens.pan  # noqa: B018


def test_importing_is_quick_and_brings_nothing_slow():
    code = (
        "import sys, time; t = time.process_time(); import layerlens; dir(layerlens); s = time.process_time() - t\n"
        "import json; print(json.dumps([s, sorted(sys.modules)]))"
    )
    taken = []
    for _ in range(5):  # the machine may be busy with something else
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds, modules = json.loads(done.stdout)
        taken.append((seconds, time.perf_counter() - began))
        assert not [name for name in modules if name.partition(".")[0] in SLOW]
        assert [name for name in modules if name.partition(".")[0] == "layerlens"] == ["layerlens"]
        if seconds < MOST_SECONDS:
            return
    raise AssertionError(f"{taken} seconds for the import and for the process")
