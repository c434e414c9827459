"""What a model is fine-tuned for: how samples become its inputs and targets, and the loss of each sample.

Profiling, training and evaluation take a task from ``TASKS`` and know nothing else of texts or images::

    task = TASKS["token-classification"]
    batches = make_batches(task, pretrained, dataset, data_config, batch_size=16)
    losses__b = task.loss(pretrained.model(**batches[0].inputs), batches[0])
"""

from layerlens.tasks.batches import Batch, Batches, make_batches
from layerlens.tasks.losses import IGNORED, Loss, logits_of
from layerlens.tasks.registry import TASKS, Task, task_for

__all__ = ["IGNORED", "TASKS", "Batch", "Batches", "Loss", "Task", "logits_of", "make_batches", "task_for"]
