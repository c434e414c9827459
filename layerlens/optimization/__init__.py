"""The allocation problem and its certified answer: Lagrangian bound, searches on the core, CP-SAT; frontiers."""

from layerlens.optimization.explain import explain, frozen_stages
from layerlens.optimization.frontier import Frontier, budget_sweep, frontier
from layerlens.optimization.problem import build_problem
from layerlens.optimization.solver import solve
from layerlens.optimization.uniform import uniform_lora

__all__ = [
    "Frontier",
    "budget_sweep",
    "build_problem",
    "explain",
    "frontier",
    "frozen_stages",
    "solve",
    "uniform_lora",
]
