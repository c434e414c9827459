"""The allocation problem and its certified answer: greedy-Lagrangian solver, CP-SAT refinement."""

from layerlens.optimization.problem import build_problem
from layerlens.optimization.solver import solve

__all__ = ["build_problem", "solve"]
