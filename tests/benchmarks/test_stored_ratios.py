"""The benchmarks' regression gate compares with the same kind of processor only, and recording keeps the others'."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from layerlens import kernels

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("stored_ratios", ROOT / "benchmarks/stored_ratios.py")
stored_ratios = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(stored_ratios)

AMD, INTEL = "AuthenticAMD family 26 avx512", "GenuineIntel family 6 avx512"
CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC: a name with a colon

processor\t: 1
vendor_id\t: AuthenticAMD
cpu family\t: 25
"""


@pytest.mark.parametrize(
    ("cpuinfo", "isa", "wanted"),
    [
        (CPUINFO, "avx512", AMD),
        (CPUINFO, "avx2", "AuthenticAMD family 26 avx2"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", "scalar", f"{stored_ratios.platform.machine()} scalar"),
        ("", "scalar", f"{stored_ratios.platform.machine()} scalar"),
    ],
)
def test_a_processor_is_its_vendor_family_and_instruction_set(cpuinfo: str, isa: str, wanted: str) -> None:
    assert stored_ratios.processor_key(isa, cpuinfo) == wanted


def test_this_processor_has_a_key() -> None:
    assert stored_ratios.processor_key(kernels.isa()).endswith(f" {kernels.isa()}")


def test_recording_keeps_other_processors_and_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernel_ratios.json"
    assert stored_ratios.read_ratios(path) == {}
    stored_ratios.record_ratios(path, AMD, {"row energy": 1.5, "ragged": 2.0})
    stored_ratios.record_ratios(path, INTEL, {"row energy": 1.1})
    stored_ratios.record_ratios(path, AMD, {"row energy": 1.6})
    assert json.loads(path.read_text()) == {AMD: {"row energy": 1.6, "ragged": 2.0}, INTEL: {"row energy": 1.1}}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_processor_without_ratios_is_told_so_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "kernel_ratios.json"
    stored_ratios.record_ratios(path, AMD, {"row energy": 1.5})
    assert stored_ratios.missing_ratios(path, AMD) is None
    said = stored_ratios.missing_ratios(path, INTEL)
    assert said is not None
    assert len(said.splitlines()) == 1
    for part in (INTEL, AMD, "LAYERLENS_BENCHMARK_RECORD=benchmarks/results"):
        assert part in said


def test_what_is_stored_in_the_repository_is_by_processor() -> None:
    for processor, ratios in stored_ratios.read_ratios(stored_ratios.STORED).items():
        assert processor.split()[-1] in ("scalar", "avx2", "avx512")
        assert ratios
        assert all(ratio > 0.0 for ratio in ratios.values())
