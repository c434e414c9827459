"""Published instances: every layout gives the same problem, damaged files are refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest
from instances import random_problem
from mmkp_instances import read_mmkp

from layerlens.exceptions import OptimizationError
from layerlens.kernels.reference import exhaustive_optimum
from layerlens.optimization import solve

# Our own numbers in the layouts of the published files.
KHAN = """ 3  2 2
 10  9
 1
 4.00  3  1
 7.50  6  4
 2
 1.00  0  2
 9.00  5  5
 3
 2.00  1  1
 3.00  2  0
 2  1  2  14.50
 Upper bound
 15.71
"""
WITHOUT_NUMBERS = "\n".join(line for line in KHAN.splitlines()[:11] if len(line.split()) != 1)
IRREGULAR = "\ufeff" + KHAN.replace(" 3  2 2", "3 2").replace("\n 1\n", "\n 2\n").replace("\n 3\n", "\n 2\n")


@pytest.mark.parametrize("text", [KHAN, WITHOUT_NUMBERS, IRREGULAR], ids=["khan", "no numbers", "irregular"])
def test_every_layout_gives_the_same_problem(tmp_path: Path, text: str) -> None:
    path = tmp_path / "instance"
    path.write_text(text, encoding="utf-8")
    problem = read_mmkp(path)
    assert problem.layers == ("group 1", "group 2", "group 3")
    assert problem.offset.tolist() == [0, 2, 4, 6]
    assert problem.value.tolist() == [4.0, 7.5, 1.0, 9.0, 2.0, 3.0]
    assert problem.cost__ro.tolist() == [[3, 6, 0, 5, 1, 2], [1, 4, 2, 5, 1, 0]]
    assert problem.capacity.tolist() == [10, 9]
    answer = solve(problem)
    assert answer.value == 16.0  # 4 + 9 + 3: uses 10 and 6
    assert answer.status == "optimal"


def test_groups_of_different_sizes(tmp_path: Path) -> None:
    path = tmp_path / "instance"
    path.write_text("2 1\n5\n3\n1 1\n2 2\n9 6\n1\n4 3\n")
    problem = read_mmkp(path)
    assert problem.offset.tolist() == [0, 3, 4]
    assert solve(problem).value == 6.0


def test_random_problems_survive_being_written(tmp_path: Path) -> None:
    for seed in range(20):
        problem = random_problem(seed, max_allocations=200)
        lines = [f"{len(problem.layers)} {len(problem.capacity)}", " ".join(map(repr, problem.capacity.tolist()))]
        for begin, end in zip(problem.offset[:-1], problem.offset[1:], strict=True):
            lines.append(str(end - begin))
            lines += [
                " ".join(map(repr, [float(problem.value[o]), *problem.cost__ro[:, o].tolist()]))
                for o in range(begin, end)
            ]
        path = tmp_path / f"{seed}"
        path.write_text("\n".join(lines))
        again = read_mmkp(path)
        assert again.value.tolist() == problem.value.tolist()
        assert again.cost__ro.tolist() == problem.cost__ro.tolist()
        best, _ = exhaustive_optimum(problem.offset, problem.value, problem.cost__ro, problem.capacity)
        assert solve(again).value == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: the file ends before the header"),
        ("3\n", ":1: the header has 1 numbers; expected `n l m` or `n m`"),
        ("x 2 2\n", ":1: groups: expected a number, got 'x'"),
        ("0 2 2\n", ":1: groups: expected a whole number above 0, got 0"),
        ("1 1\n5\n1\n4 3 2\n", ":4: value and costs of group 1: expected 2 numbers, got 3"),
        ("1 1\n5\n2\n4 3\n", ":4: the file ends before value and costs of group 1"),
        ("1 1\n5\n1\n4 nan\n", ":4: value and costs of group 1: expected a number, got 'nan'"),
        ("1 1\n5\n1\n4 -1\n", ": costs and capacities must be at least 0"),
    ],
)
def test_damaged_files_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "instance"
    path.write_text(text)
    with pytest.raises(OptimizationError) as caught:
        read_mmkp(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(OptimizationError, match="no-such-file: No such file"):
        read_mmkp(tmp_path / "no-such-file")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(OptimizationError, match="binary: not a text file"):
        read_mmkp(binary)
