"""What a model is fine-tuned for: how samples become inputs and targets, the loss of each, and what it is judged by.

Profiling, training and evaluation take a task from ``TASKS`` and know nothing else of texts or images::

    task = TASKS["token-classification"]
    batches = make_batches(task, pretrained, dataset, data_config, batch_size=16)
    losses__b = task.loss(pretrained.model(**batches[0].inputs), batches[0])
"""

from layerlens.registry import TASKS
from layerlens.tasks.batches import Batch, Batches
from layerlens.tasks.losses import IGNORED, Loss, logits_of
from layerlens.tasks.metrics import Metrics
from layerlens.tasks.task import Task, make_batches, task_for, task_metrics

__all__ = [
    "IGNORED",
    "TASKS",
    "Batch",
    "Batches",
    "Loss",
    "Metrics",
    "Task",
    "logits_of",
    "make_batches",
    "task_for",
    "task_metrics",
]
