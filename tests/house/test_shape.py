"""The shape of the house: no import circles, files of one idea's size, method names only where methods are."""

from __future__ import annotations

import graphlib
import io
import statistics
import subprocess
import tokenize
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
CODE = ("layerlens", "cpp", "cython_bindings")
LONGEST, MEDIAN_BETWEEN = 500, (150, 250)

METHOD_ROOMS = ("layerlens/methods/", "layerlens/config/", "layerlens/registry.py")
"""Rooms that may name a PEFT method: its own, the configuration's defaults, and the table of names."""
FORMATS = {  # file -> what it names
    "layerlens/models/model_spec.py": "the constants",
    "layerlens/models/manifest.py": "the manifest's section of that name",
    "layerlens/manifest/schema.py": "the same, in its file",
    "layerlens/manifest/report.py": "the same, in the report",
    "layerlens/tuning/tools.py": "what other trainers' files call it",
    "layerlens/library/axolotl.py": "the same, in axolotl's",
    "layerlens/tuning/gguf.py": "the kind of adapter, in GGUF's",
}


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *CODE], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [
        ROOT / name for name in listed.splitlines() if name.endswith(suffixes or (".py",)) and (ROOT / name).is_file()
    ]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_module_imports_itself_through_others():
    graph = grimp.build_graph("layerlens", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # CycleError names the circle


def test_a_file_holds_one_idea_of_a_size_that_one_opens():
    sizes = {path: lines(path) for path in tracked(".py", ".cpp", ".hpp", ".pyx", ".pxd", ".pyi")}
    assert {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > LONGEST} == {}
    ideas = [size for path, size in sizes.items() if path.suffix == ".py" and path.name != "__init__.py"]
    assert MEDIAN_BETWEEN[0] <= statistics.median(ideas) <= MEDIAN_BETWEEN[1]


def test_method_names_stand_where_methods_are():
    """Elsewhere a method is asked, so that one more of them changes no other room."""
    hits = {}
    for path in tracked(".py"):
        name = str(path.relative_to(ROOT))
        if name.startswith(METHOD_ROOMS) or name in FORMATS:
            continue
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        texts = [token for token in tokens if token.type == tokenize.STRING and token.string in {'"lora"', "'lora'"}]
        if texts:
            hits[name] = [token.start[0] for token in texts]
    assert hits == {}
