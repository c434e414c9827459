"""The allocation problem and its certified answer: Lagrangian bound, searches on the core, CP-SAT; frontiers."""

from layerlens.optimization.charged_solver import stage_bounds
from layerlens.optimization.cheapest import as_uniform, cheapest_problem, saving_of, uniform_reference
from layerlens.optimization.explain import explain, frozen_stages
from layerlens.optimization.frontier import Frontier, budget_sweep, frontier
from layerlens.optimization.problem import build_problem
from layerlens.optimization.solver import solve
from layerlens.optimization.uniform import uniform_lora

__all__ = [
    "Frontier",
    "as_uniform",
    "budget_sweep",
    "build_problem",
    "cheapest_problem",
    "explain",
    "frontier",
    "frozen_stages",
    "saving_of",
    "solve",
    "stage_bounds",
    "uniform_lora",
    "uniform_reference",
]
