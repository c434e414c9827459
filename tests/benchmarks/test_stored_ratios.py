"""The benchmarks' regression gate compares with the same kind of processor only, and recording keeps the others'."""

from __future__ import annotations

import importlib.util
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


def test_recording_keeps_other_processors_other_cases_and_the_best(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernel_ratios.json"
    assert stored_ratios.ratios_of(path, AMD) == {}
    assert stored_ratios.never_met(path) == []
    targets = {"row energy": 1.55, "ragged": 2.5}
    stored_ratios.record_ratios(path, AMD, {"row energy": 1.5, "ragged": 2.0}, targets)
    stored_ratios.record_ratios(path, INTEL, {"row energy": 1.1}, targets)
    stored_ratios.record_ratios(path, AMD, {"row energy": 1.6}, targets)
    stored_ratios.record_ratios(path, AMD, {"row energy": 1.4}, targets)
    assert stored_ratios.ratios_of(path, AMD) == {"row energy": 1.4, "ragged": 2.0}
    assert stored_ratios.ratios_of(path, INTEL) == {"row energy": 1.1}
    assert stored_ratios.best_of(path, AMD) == {"row energy": 1.6, "ragged": 2.0}
    assert stored_ratios.never_met(path) == [
        f"AMD Zen 5 ({AMD}), never met: 1 of 2 wanted ratios: ragged 2.00 of 2.50",
        f"Intel Xeon ({INTEL}), never met: 1 of 1 wanted ratios: row energy 1.10 of 1.55",
    ]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_processor_without_ratios_is_told_so_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "kernel_ratios.json"
    stored_ratios.record_ratios(path, AMD, {"row energy": 1.5}, {"row energy": 1.1})
    assert stored_ratios.missing_ratios(path, AMD) is None
    said = stored_ratios.missing_ratios(path, INTEL)
    assert said is not None
    assert len(said.splitlines()) == 1
    for part in (INTEL, AMD, "Zen 5", "LAYERLENS_BENCHMARK_RECORD=benchmarks/results"):
        assert part in said


def test_what_is_stored_in_the_repository_is_by_processor_and_says_what_is_wanted() -> None:
    stored = stored_ratios.read(stored_ratios.STORED)
    assert {entry["name"] for entry in stored["processors"].values()} >= {"AMD Zen 4", "AMD Zen 5", "Intel Xeon"}
    for processor, entry in stored["processors"].items():
        assert processor.split()[-1] in ("scalar", "avx2", "avx512")
        assert entry["name"] == stored_ratios.FAMILIES.get(processor, processor)
        assert entry["ratios"].keys() == entry["best"].keys() <= stored["targets"].keys()
        assert all(entry["best"][case] >= ratio > 0.0 for case, ratio in entry["ratios"].items())
    assert len(stored_ratios.never_met(stored_ratios.STORED)) == len(stored["processors"])
    peers = ["numpy einsum", "numpy vecdot"]
    assert stored_ratios.peers_then(stored_ratios.STORED, AMD, peers) == peers[:1]
    assert stored_ratios.peers_then(stored_ratios.STORED, "unknown", peers) == peers
