"""``doctor``: what is missing is named with the line that gets it, and only what must be mended fails."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
from cli_support import Invoke, parsed

from layerlens.cli import commands_doctor as machine
from layerlens.cli.commands_doctor import HINT, OK, PROBLEM, Finding, Requirement, parse_requirements, pip_line


def test_requirements_are_read_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"numpy": "2.4.6", "torch": "2.3.1+cpu", "peft": "0.18.0rc1", "PyYAML": "6"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    found = parse_requirements(
        [
            "numpy>=1.26",
            "torch>=2.4",
            "PyYAML",
            'peft>=0.18; extra == "hf"',
            'uvicorn[standard]<2,>=0.30; python_version > "3" and extra == "serve"',
            'layerlens[hf]; extra == "quickstart"',
            'pytest>=8; extra == "test"',
        ]
    )
    assert found == [
        Requirement("numpy", "", "1.26", "2.4.6"),
        Requirement("torch", "", "2.4", "2.3.1+cpu"),
        Requirement("PyYAML", "", "", "6"),
        Requirement("peft", "hf", "0.18", "0.18.0rc1"),
        Requirement("uvicorn", "serve", "0.30", None),
    ]
    assert [requirement.satisfied for requirement in found] == [True, False, True, True, False]
    assert pip_line(found[4:]) == "pip install 'layerlens[serve]'"
    assert pip_line(found[1:2]) == "pip install --upgrade layerlens"


def test_missing_core_is_a_problem_and_a_missing_extra_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = [Requirement("numpy", "", "1.26", "1.20"), Requirement("peft", "hf", "0.18", None)]
    monkeypatch.setattr(machine, "requirements", lambda: needed)
    _, core, extra = machine._packages()
    assert core == Finding("core packages", "numpy 1.20 (needs 1.26)", PROBLEM, "pip install --upgrade layerlens")
    assert extra == Finding("extra [hf]", "peft missing", HINT, "pip install 'layerlens[hf]'")
    monkeypatch.setattr(machine, "requirements", lambda: None)
    assert [finding.status for finding in machine._packages()] == [HINT]


def test_kernels_that_do_not_load_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "layerlens.kernels", None)
    (finding,) = machine._kernels()
    assert finding.status == PROBLEM
    assert "pip install" in finding.advice


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path / "file/cache"))
    assert machine._cache().status == PROBLEM
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path))
    (tmp_path / "file").write_bytes(b"0" * 2_500_000)
    assert machine._cache() == Finding("cache", f"{tmp_path}, 2.5 MB")


def test_exit_code_and_both_outputs(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("memory", "8 GB"), Finding("extra [hf]", "peft missing", HINT, "pip install 'layerlens[hf]'")]
    monkeypatch.setattr(machine, "examine", lambda: findings)
    shown = invoke("doctor")
    assert shown.exit_code == 0
    assert "extra [hf]" in shown.stderr
    assert "→ pip install 'layerlens[hf]'" in shown.stderr
    findings.append(Finding("compiled kernels", "gone", PROBLEM, "reinstall"))
    failed = invoke("doctor", "--json")
    assert failed.exit_code == 1
    assert parsed(failed)["findings"][2] == {
        "subject": "compiled kernels",
        "found": "gone",
        "status": PROBLEM,
        "advice": "reinstall",
    }


def test_a_gpu_that_torch_cannot_use_is_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "none")
    assert machine._gpu() == [Finding("GPU", "none")]
    monkeypatch.setattr(machine, "NVIDIA", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for the CPU only" in machine._gpu()[0].found
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert (machine._gpu()[0].status, "CUDA 12.8" in machine._gpu()[0].found) == (HINT, True)


def test_thread_pools_are_seen_without_threadpoolctl(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    with_it = {path: is_openmp for path, (_, is_openmp) in machine._thread_pools().items()}
    find = importlib.util.find_spec
    monkeypatch.setattr(
        machine.importlib.util, "find_spec", lambda name: None if name == "threadpoolctl" else find(name)
    )
    without = {path: is_openmp for path, (_, is_openmp) in machine._thread_pools().items()}
    openmp = {Path(path).resolve() for path, is_openmp in without.items() if is_openmp}
    assert openmp == {Path(path).resolve() for path, is_openmp in with_it.items() if is_openmp} != set()


def test_this_machine() -> None:
    findings = {finding.subject: finding for finding in machine.examine()}
    assert findings["Python"].found.startswith(".".join(map(str, sys.version_info[:3])))
    assert findings["compiled kernels"].status == OK
    assert "scalar" in findings["compiled kernels"].found
    assert "GB free of" in findings["memory"].found
