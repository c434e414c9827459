"""LoRA that a small network generates: optional plug-ins, found by the entry-point group ``layerlens.generators``.

While it trains, the generator's parameters train instead of A and B; what is saved afterwards is ordinary LoRA.
"""

from layerlens.tuning.generators.generated_layer import GeneratedLayer
from layerlens.tuning.generators.generator import (
    GROUP,
    attach_generator,
    finish_generator,
    known_generators,
    load_generator,
    use_task,
)

__all__ = [
    "GROUP",
    "GeneratedLayer",
    "attach_generator",
    "finish_generator",
    "known_generators",
    "load_generator",
    "use_task",
]
