"""What code is made of: every change that can be seen in results changes the digest, and nothing else does."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from layerlens.integrations.model_code import READERS, model_code
from layerlens.utils.code_identity import CodeIdentity, code_identity, is_own

PROJECT = """
    import math, functools, threading
    import torch
    from torch import nn
    import project_helpers as helpers
    from project_helpers import scaled

    WEIGHT = 1.0
    TABLE = {"a": [1.0, 2.0], "b": {"x", "y", "z"}}
    CENTRES = torch.arange(4.0)

    def base(x, factor=2.0, *, shift=0.0):
        return x * factor + shift

    def loss(output, y):
        def inner(v):
            return base(v) * WEIGHT
        return inner(output) - y

    def by_table(output, y):
        return output * TABLE["a"][0] + (output if "x" in TABLE["b"] else 0) + CENTRES.sum()

    def by_attribute(output, y):
        return helpers.temperature * output

    def by_function(output, y):
        return scaled(output)

    def imports_late(output, y):
        from project_helpers import scaled as late
        return late(output)

    def by_name(output, y):
        return getattr(helpers, "".join(["temper", "ature"])) * output

    def made(power):
        return lambda output, y: output ** power

    raised = made(2)
    partly = functools.partial(base, shift=1.0)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.margin = 0.5
            self.centre = nn.Parameter(torch.ones(2))
        def forward(self, output, y):
            return self.helper(output) - self.margin
        def helper(self, output):
            return output + 1

    class Own:
        scale = 3.0
        def __init__(self):
            self.lock = threading.Lock()
            self.bias = 1.0
        def __call__(self, output, y):
            return output * self.scale + self.bias

    class Child(Own):
        pass

    instance, child, method, module = Own(), Child(), Own().__call__, Loss()

    @functools.lru_cache
    def cached(x):
        return x + 1
"""
HELPERS = """
    temperature = 2.0
    unused = 1
    def scaled(x):
        return deeper(x) * 3
    def deeper(x):
        return x + 1
"""
EDITS: list[tuple[str, str, str, str]] = [  # what is looked at, the file, a text and what it becomes
    ("loss", "project", "base(v) * WEIGHT", "base(v) + WEIGHT"),
    ("loss", "project", "WEIGHT = 1.0", "WEIGHT = 1.5"),
    ("loss", "project", "factor=2.0", "factor=3.0"),
    ("loss", "project", "shift=0.0", "shift=0.1"),
    ("loss", "project", "x * factor", "x / factor"),
    ("by_table", "project", "[1.0, 2.0]", "[1.0, 2.5]"),
    ("by_table", "project", '"y", "z"', '"y", "w"'),
    ("by_table", "project", "arange(4.0)", "arange(5.0)"),
    ("by_attribute", "project_helpers", "temperature = 2.0", "temperature = 2.5"),
    ("by_function", "project_helpers", "x + 1", "x + 2"),
    ("imports_late", "project_helpers", "x + 1", "x + 2"),
    ("by_name", "project_helpers", "temperature = 2.0", "temperature = 2.5"),
    ("raised", "project", "made(2)", "made(3)"),
    ("partly", "project", "shift=1.0", "shift=1.5"),
    ("partly", "project", "x * factor", "x / factor"),
    ("module", "project", "self.margin = 0.5", "self.margin = 0.25"),
    ("module", "project", "torch.ones(2)", "torch.zeros(2)"),
    ("module", "project", "output + 1", "output + 2"),
    ("instance", "project", "scale = 3.0", "scale = 4.0"),
    ("instance", "project", "self.bias = 1.0", "self.bias = 2.0"),
    ("child", "project", "output * self.scale", "output - self.scale"),
    ("method", "project", "self.bias = 1.0", "self.bias = 2.0"),
    ("cached", "project", "return x + 1", "return x + 2"),
]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Any]]:
    """Both modules, imported anew from these sources."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(project: str, helpers: str) -> Any:
        for name, text in (("project", project), ("project_helpers", helpers)):
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("project")

    yield load
    for name in ("project", "project_helpers"):
        sys.modules.pop(name, None)


def identity(value: Any) -> CodeIdentity:
    return code_identity({"it": value}, READERS)


@pytest.mark.parametrize(("name", "file", "before", "after"), EDITS)
def test_an_edit_that_is_seen_in_results_changes_the_digest(
    imported: Any, name: str, file: str, before: str, after: str
):
    texts = {"project": PROJECT, "project_helpers": HELPERS}
    first = identity(getattr(imported(*texts.values()), name))
    assert first == identity(getattr(imported(*texts.values()), name))  # the same text, loaded again
    assert before in texts[file]
    texts[file] = texts[file].replace(before, after)
    second = identity(getattr(imported(*texts.values()), name))
    assert first.digest != second.digest
    assert not first.unknown
    assert not second.unknown


@pytest.mark.parametrize("name", ["loss", "by_attribute", "by_function", "module", "instance"])
def test_what_is_not_seen_in_results_does_not(imported: Any, name: str):
    first = identity(getattr(imported(PROJECT, HELPERS), name))
    moved = "\n\n    # a comment\n    other = 5\n" + PROJECT.replace("made(2)", "made(7)")
    assert identity(getattr(imported(moved, HELPERS.replace("unused = 1", "unused = 2")), name)) == first


def test_a_function_is_the_same_after_it_was_called(imported: Any):
    project = imported(PROJECT, HELPERS)
    first = identity(project.loss)
    for _ in range(200):  # Python adapts instructions of what is called often
        project.loss(1.0, 2.0)
    assert identity(project.loss) == first


def test_it_is_the_same_in_every_process(tmp_path: Path):
    (tmp_path / "project.py").write_text(textwrap.dedent(PROJECT))
    (tmp_path / "project_helpers.py").write_text(textwrap.dedent(HELPERS))
    script = (
        "import project; from layerlens.integrations.model_code import READERS; "
        "from layerlens.utils.code_identity import code_identity; names = sorted(vars(project)); "
        "print(code_identity({n: vars(project)[n] for n in names if n[0] != '_'}, READERS).digest)"
    )
    said = set()
    for seed in ("1", "2"):  # sets have another order, and the second process reads bytecode that the first has saved
        environment = {"PYTHONHASHSEED": seed, "PATH": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", script]
        said.add(
            subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
        )
    assert len(said) == 1


def test_code_without_a_file_is_read_by_its_bytecode():
    def of(text: str) -> CodeIdentity:
        names: dict[str, Any] = {}
        exec(compile(text, "<stdin>", "exec"), names)
        return identity(names["f"])

    assert of("def f(x): return x + 1") == of("def f(x):\n    # said\n    return x + 1")
    assert of("def f(x): return x + 1") != of("def f(x): return x + 2")
    assert of("k = 1\ndef f(x): return x + k") != of("k = 2\ndef f(x): return x + k")


def test_what_cannot_be_read_is_named(tmp_path: Path):
    numbers = (n for n in range(3))
    with (tmp_path / "file").open("w") as file:

        def loss(output: Any, y: Any) -> Any:
            return output + next(numbers) + len(file.name)

        unknown = identity(functools.partial(loss)).unknown
    assert len(unknown) == 2
    assert any("generator" in what for what in unknown.values())
    assert any("TextIOWrapper" in what for what in unknown.values())
    assert all("loss" in where for where in unknown)


def test_functions_of_packages_are_told_apart_by_name_and_version(monkeypatch: pytest.MonkeyPatch):
    assert not is_own(torch.nn.functional.__file__)
    assert not is_own(functools.__file__)
    assert is_own(__file__)
    before = identity(nn.functional.gelu), identity(nn.functional.relu)
    assert before[0] != before[1]
    assert not before[0].unknown
    monkeypatch.setattr("layerlens.utils.code_identity._version_of", lambda module: b"another")
    assert identity(nn.functional.relu) != before[1]


def test_wrappers_of_packages_do_not_hide_what_is_in_them():
    def one(x: Any) -> Any:
        return x + 1

    def two(x: Any) -> Any:
        return x + 2

    for wrap in (
        torch.no_grad(),
        functools.lru_cache,
        torch.compile,
        functools.wraps(nn.functional.relu),
        staticmethod,
    ):
        assert identity(wrap(one)) != identity(wrap(two)), wrap


def test_values_of_every_kind():
    pairs: list[tuple[Any, Any]] = [
        (np.arange(3), np.arange(4)), (np.array([{"a": 1}], dtype=object), np.array([{"a": 2}], dtype=object)),
        (torch.ones(2), torch.ones(2, dtype=torch.float16)), (torch.float32, torch.float16), ({1: 2}, {1: 3}),
        ([1, [2]], [1, [3]]), (frozenset("ab"), frozenset("ac")), (Path("a"), Path("b")), (nn.Linear, nn.Conv2d),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)), (1, 1.0), (True, 1), ("1", 1),
        (nn.ReLU(), nn.GELU()), (nn.Dropout(0.1), nn.Dropout(0.2)),
        (np.random.default_rng(1), np.random.default_rng(2)),
    ]  # fmt: skip
    for one, other in pairs:
        assert identity(one) != identity(other), one
        assert identity(one) == identity(one)
        assert not identity(one).unknown
    around: list[Any] = []
    around.append(around)
    assert identity(around) == identity(around)
    assert not identity(threading.Lock()).unknown


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.inner = scale, nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


def test_a_model_is_more_than_its_weights(monkeypatch: pytest.MonkeyPatch):
    def of(model: nn.Module) -> str:
        found = model_code(model, {})
        assert not found.unknown
        return found.digest

    assert of(Scaled(1.0)) == of(Scaled(1.0))  # whatever their weights
    assert of(Scaled(1.0)) != of(Scaled(2.0))
    hooked = Scaled(1.0)
    hooked.inner.register_forward_hook(lambda module, args, output: output * 2)
    assert of(hooked) != of(Scaled(1.0))
    patched = Scaled(1.0)
    patched.inner.forward = lambda x: x  # type: ignore[method-assign]
    assert of(patched) != of(Scaled(1.0))
    before = of(Scaled(1.0))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert of(Scaled(1.0)) != before


def test_a_configuration_is_part_of_a_model_and_where_it_lies_is_not(tmp_path: Path):
    def of(**settings: Any) -> str:
        shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        return model_code(BertModel(BertConfig(vocab_size=9, **shape, **settings)), {}).digest

    assert of() != of(hidden_act="relu")
    assert of() != of(layer_norm_eps=1e-3)
    assert of() == of(name_or_path="elsewhere")


def test_traced_and_scripted_code_is_read():
    class Two(Scaled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) - 1

    one, two = torch.fx.symbolic_trace(Scaled(1.0)), torch.fx.symbolic_trace(Two(1.0))
    assert model_code(one, {}).digest != model_code(two, {}).digest
