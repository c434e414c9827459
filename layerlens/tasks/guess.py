"""Which task a model and its data are for, where nobody has said it."""

from __future__ import annotations

from layerlens.registry import TASKS


def task_of_class(class_name: str) -> str | None:
    """The task whose head a model class has, by the ending of its name; None where no task claims it.

    A class of single numbers (``ForSequenceClassification`` with one output) is told apart by the data alone.

    >>> task_of_class("LlamaForCausalLM"), task_of_class("BertModel")
    ('causal-lm', None)
    """
    found = [(len(end), task.name) for task in TASKS.values() for end in task.endings if class_name.endswith(end)]
    longest = max((length for length, _ in found), default=0)
    return next((name for length, name in found if length == longest), None)
