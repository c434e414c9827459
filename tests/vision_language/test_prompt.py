"""From boxes to words and back."""

from __future__ import annotations

import pytest

from layerlens.config.vision_language import PipelineConfig
from layerlens.exceptions import ConfigurationError
from layerlens.models import Detection
from layerlens.vision_language.prompt import build_messages, check_report, level, place

NODULE = Detection("nodule", 0.934, (0, 0, 20, 20))  # upper left
LOW = Detection("nodule", 0.61, (70, 80, 90, 100))  # lower right
FRACTURE = Detection("fracture", 0.3, (45, 45, 55, 55))  # middle
KNOWN = ("nodule", "fracture", "device", "traffic light", "person")
RIGHT = (
    "Nodule in the upper left (high confidence). Nodule in the lower right (moderate confidence). In all 2 findings."
)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((0, 0, 10, 10), "upper left"),
        ((45, 45, 55, 55), "middle"),
        ((45, 80, 55, 100), "lower center"),
        ((90, 40, 100, 60), "middle right"),
        ((100, 100, 100, 100), "lower right"),
    ],
)
def test_place(box: tuple, words: str):
    assert place(box, (100, 100)) == words


def test_levels_are_of_the_confidence_that_is_shown():
    assert [level(value) for value in (0.996, 0.796, 0.794, 0.496, 0.49)] == [
        "high", "high", "moderate", "moderate", "low"
    ]  # fmt: skip


def test_messages_list_every_finding():
    system, user = build_messages([NODULE, NODULE], image="a.png", size=(100, 100))
    assert system["role"] == "system"
    for number in (1, 2):
        assert f"\n{number}. nodule, upper left, confidence 0.93 (high)\n" in user["content"]
    assert "(2)" in user["content"]


def test_a_template_of_ones_own():
    _, user = build_messages([NODULE], image="a.png", size=(9, 8), template="{image} {width}x{height} {{}}: {findings}")
    assert user["content"].startswith("a.png 9x8 {}: 1. nodule")


def checked(report: str, *detections: Detection) -> dict:
    return check_report(report, detections, KNOWN, (100, 100))


@pytest.mark.parametrize(
    ("report", "detections"),
    [
        (RIGHT, (NODULE, LOW)),
        ("There are two nodules: one in the upper left (0.93), one in the lower right (61 %).", (NODULE, LOW)),
        ("Two nodules and one fracture. The nodule in the lower right is moderate.", (NODULE, LOW, FRACTURE)),
        ("Findings:\n1. **Nodule**, top-left, confidence: high\n2. Nodule - bottom right, 0.61\n", (NODULE, LOW)),
        ("In the upper left there is a nodule, in the centre a fracture.", (NODULE, FRACTURE)),
        ("A nodule on the left, in the upper third, without fracture or device.", (NODULE,)),
        ("A nodule is seen. It lies in the upper left. No other findings.", (NODULE,)),
        ("No evidence of a fracture. A single nodule with a confidence of 0.9.", (NODULE,)),
        ("Fractures are not seen; one nodule is.", (NODULE,)),
        ("Nodules (two), nothing else.", (NODULE, LOW)),
        ("Two people at a traffic light.", (Detection("person", 0.9, (0, 0, 9, 9)),) * 2
         + (Detection("traffic light", 0.9, (50, 0, 60, 9)),)),
        ("Number of findings: 2. Nodules: 2. Fractures: 0.", (NODULE, LOW)),
        ("The nodule in the left upper area has 0.93, while the lower right nodule has 0.61.", (NODULE, LOW)),
        ("| nodule | upper left | 0.93 |\n| nodule | lower right | 0.61 |\n", (NODULE, LOW)),
        ("Zwei Befunde: nodule, nodule.", (NODULE, LOW)),
    ],
)  # fmt: skip
def test_reports_that_are_right(report: str, detections: tuple[Detection, ...]):
    assert not any(checked(report, *detections).values()), checked(report, *detections)


@pytest.mark.parametrize(
    ("report", "detections", "wrong", "fault"),
    [
        (RIGHT.replace("lower right", "lower left"), (NODULE, LOW), [2], "no nodule in the lower left (nodule, lower"),
        (RIGHT.replace("upper", "lower"), (NODULE, LOW), [1], "no nodule in the lower left"),
        (RIGHT.replace("moderate", "high"), (NODULE, LOW), [2], "the confidence is 0.61 (nodule, lower right"),
        (RIGHT.replace("In all 2", "In all 3"), (NODULE, LOW), [3], "2 detected, 3 said"),
        (RIGHT.replace("lower right (moderate", "upper left (high"), (NODULE,), [2, 3], "1 nodule detected, and named"),
        ("One nodule was found.", (NODULE, LOW), [1], "2 nodule detected, 1 said"),
        ("Nodules: 3.", (NODULE, LOW), [1], "2 nodule detected, 3 said"),
        ("Nodule (upper left, 0.39).", (NODULE,), [1], "the confidence is 0.93"),
        ("Several nodules.", (NODULE,), [1], "1 nodule detected, several said"),
        ("A nodule in the upper left with 39 % confidence.", (NODULE,), [1], "the confidence is 0.93"),
        ("Nodule upper left. A device beside it.", (NODULE,), [2], "no device was detected"),
        ("There is no nodule.", (NODULE,), [1], "there is a nodule, upper left, 0.93"),
        ("No findings.", (NODULE,), [1], "there is a nodule, upper left, 0.93"),
        ("A nodule. It lies on the right.", (NODULE,), [2], "no finding in the right"),
        ("A nodule and a fracture in the upper left.", (NODULE, FRACTURE), [1], "no fracture in the upper left"),
    ],
)  # fmt: skip
def test_wrong_sentences_are_named(report: str, detections: tuple[Detection, ...], wrong: list[int], fault: str):
    found = checked(report, *detections)["sentences"]
    assert [one["number"] for one in found] == wrong
    assert fault in " ".join(fault for one in found for fault in one["faults"])


def test_what_a_report_leaves_out():
    found = checked("A fracture.", NODULE)
    assert (found["left_out"], found["not_detected"]) == (["nodule"], ["fracture"])
    assert checked("A nodule in the upper left.", NODULE, LOW)["missing"] == ["nodule, lower right, 0.61"]
    assert checked("A nodule, and a nodule.", NODULE, LOW)["missing"] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "Say {something} of {findings}"}, r"prompt: does not know \{something\}"),
        ({"prompt": "Report!"}, r"prompt: must contain \{findings\}"),
        ({"prompt": "{findings"}, "prompt: is not a template"),
        ({"timeout_s": 0}, "timeout_s: .*greater than 0, got 0"),
        ({"confidence": 2}, "confidence: .*got 2"),
        ({"images": ()}, "images: "),
        ({"batch_size": 0}, "batch_size: .*got 0"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        PipelineConfig(**{"images": ("a.png",), "detector": "d", "llm": "l", **settings})
