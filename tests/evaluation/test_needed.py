"""A study measures what its arms read and nothing else, and every arm has what it reads."""

from __future__ import annotations

from pathlib import Path

from layerlens.config.study import study_arms
from layerlens.evaluation.results import ResultsFile
from layerlens.evaluation.study import Study, needed_by
from layerlens.evaluation.study_task import StudyTask


def test_what_arms_read() -> None:
    assert needed_by(("uniform", "adalora")) == (("gradient",), False)
    assert needed_by(("uniform", "auto")) == (("gradient", "input_scale"), False)
    assert needed_by(("signal",)) == (("fisher", "gradient", "input_scale"), False)
    assert needed_by(("fisher_proportional",)) == (("fisher", "gradient"), False)
    for arm in ("eva", "eva_init", "gora", "uniform_svd"):
        assert needed_by((arm,)) == (("gradient",), True)


def test_an_arm_alone_chooses_as_it_does_beside_all_others(task: StudyTask, tmp_path: Path) -> None:
    whole = Study(task, ResultsFile.open(tmp_path / "whole.jsonl"), {"tight": 100})
    for arm in (*study_arms(), "auto_svd"):
        alone = Study(task, ResultsFile.open(tmp_path / f"{arm}.jsonl"), {"tight": 100}, arms=("uniform", arm))
        assert alone.ranks(arm, 100) == whole.ranks(arm, 100), arm
