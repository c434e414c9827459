"""Costs: what every option adds to parameters, FLOPs, training memory and latency, and what the frozen model needs.

Parameters and FLOPs follow exactly from shapes. Memory is parameters, gradients and optimiser state, plus the
activations that an option's own backward pass must keep. Latency is a roofline over the operations that an option adds.
"""

from layerlens.cost.table import OPTIMIZER_STATE, base_use, cost_table

__all__ = ["OPTIMIZER_STATE", "base_use", "cost_table"]
