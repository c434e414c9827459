"""From boxes to words and back."""

from __future__ import annotations

import pytest

from layerlens.config.vision_language import PipelineConfig
from layerlens.exceptions import ConfigurationError
from layerlens.models import Detection
from layerlens.vision_language.generation import build_messages, check_report, place

NODULE = Detection("nodule", 0.934, (0, 0, 20, 20))


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


def test_messages_list_every_finding():
    system, user = build_messages([NODULE, NODULE], image="a.png", size=(100, 100))
    assert system["role"] == "system"
    assert user["content"].count("- nodule, upper left, confidence 0.93") == 2
    assert "(2)" in user["content"]


def test_a_template_of_ones_own():
    _, user = build_messages([NODULE], image="a.png", size=(9, 8), template="{image} {width}x{height} {{}}: {findings}")
    assert user["content"].startswith("a.png 9x8 {}: - nodule")


def test_reports_are_held_against_the_boxes():
    known = ("nodule", "fracture", "device")
    assert check_report("Two Nodules, no more.", [NODULE], known) == {"left_out": [], "not_detected": []}
    assert check_report("A fracture.", [NODULE], known) == {"left_out": ["nodule"], "not_detected": ["fracture"]}


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
