"""The allocation problem and its certified answer: Lagrangian bound, searches on the core, CP-SAT; frontiers."""

from layerlens.optimization.frontier import Frontier, budget_sweep, frontier
from layerlens.optimization.problem import build_problem
from layerlens.optimization.solver import explain, solve
from layerlens.optimization.uniform import uniform_lora

__all__ = [
    "Frontier",
    "budget_sweep",
    "build_problem",
    "explain",
    "frontier",
    "solve",
    "uniform_lora",
]
