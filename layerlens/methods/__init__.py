"""PEFT methods: one object each with everything that belongs to it, listed in ``layerlens.registry.METHODS``.

A ``Method`` says what it is called, how many parameters it trains on a layer, what its forward and backward pass cost,
which gradient matrix it can move, and how it is put into a model and taken out. One that adds a module of its own to
layers derives from ``AddedModule``; it is one file and one line in the registry. Nothing here imports torch before a
model is at hand.
"""

from layerlens.methods.added_module import AddedModule, added_methods, attached, drop_hooks
from layerlens.methods.method import (
    INPUT,
    OUTPUT,
    QUERY,
    Method,
    Operation,
    enumerate_options,
    injected_sizes,
    trainable_params,
)

__all__ = [
    "INPUT",
    "OUTPUT",
    "QUERY",
    "AddedModule",
    "Method",
    "Operation",
    "added_methods",
    "attached",
    "drop_hooks",
    "enumerate_options",
    "injected_sizes",
    "trainable_params",
]
