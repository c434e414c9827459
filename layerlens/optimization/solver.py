"""From an allocation problem to an allocation with its certificate, stage by stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from layerlens.exceptions import OptimizationError
from layerlens.models import Allocation, AllocationProblem, SolverEvent
from layerlens.optimization import cpsat
from layerlens.optimization.charged import true_use
from layerlens.optimization.charged_solver import ChargedSearch, Report, effective
from layerlens.optimization.core_search import Incumbent, find_fitting, search_core
from layerlens.optimization.feasibility import check_feasible, obviously_feasible
from layerlens.optimization.lagrangian import guided_search, solve_dual
from layerlens.optimization.long_search import Deadline, search_until
from layerlens.optimization.problem import exact_sum, ldexp
from layerlens.optimization.reduced import Reduced, Summary, reduce
from layerlens.optimization.structure import check_charges

Progress = Callable[[str], None]
# Of CP-SAT's deterministic time, how much it has on a problem with charges before the searches that last.
FIRST_CP_SAT = 2.0


def solve(
    problem: AllocationProblem,
    *,
    refine: bool = True,
    refine_deterministic_time: float = 20.0,
    gap_tolerance: float = 1e-6,
    time_s: float | None = None,
    seed: int = 0,
    threads: int = 1,
    progress: Progress | None = None,
    log: Callable[[SolverEvent], None] | None = None,
) -> Allocation:
    """Find the best allocation, and prove an upper bound on every allocation within the budgets.

    The solver works in stages:

    1. Multipliers that minimise the Lagrangian bound (cutting planes), rounding errors included in the bound.
    2. An allocation guided by them: repair, one-option moves, pairs of moves.
    3. Beam searches on the core, the options whose regret leaves a chance; where they are exhaustive, a proof.
    4. With ``refine``: CP-SAT on what is left of the core, with the allocation as hint. It proves the allocation
       optimal, finds a better one or tightens the bound, and never makes anything worse.

    The result is the same bit for bit in every run, for any number of threads, on every x86-64 machine (with the same
    version of OR-Tools). ``used <= capacity`` holds exactly for the correctly rounded sums.

    Args:
        problem: the problem to solve.
        refine: run CP-SAT if the gap is still open.
        refine_deterministic_time: limit of CP-SAT, in its deterministic units of about one second.
        time_s: maximum seconds for the search, counted from the call. The search continues only while the gap is open.
            None: counted work ends the search, so that the result is the same in every run.
        gap_tolerance: relative gap up to which the status is "optimal".
        seed: random seed of the searched neighbourhoods and of CP-SAT.
        threads: number of threads for scoring, and for the two long searches, which run in parallel.
        progress: called with a few words on the present stage.
        log: called with the bound and the best value after every stage and search.

    Returns:
        the allocation with its certificate.

    Raises:
        InfeasibleError: no allocation fits, or only the empty one; the message gives the budgets that work.
        OptimizationError: the solver found no allocation that fits, but did not prove that none exists.
    """
    started = time.perf_counter()
    deadline = None if time_s is None else Deadline(time.monotonic() + time_s)

    def report(stage: str, value: float | None, bound: float) -> None:
        if log is not None:
            log(SolverEvent(time.perf_counter() - started, stage, value, bound))
        if progress is not None:
            progress(f"{stage}: bound {bound:.6g}" if value is None else f"{stage}: gap {_gap(value, bound):.2g} %")

    if problem.charged:
        return solve_charged(
            problem,
            refine=refine,
            refine_deterministic_time=refine_deterministic_time,
            gap_tolerance=gap_tolerance,
            deadline=deadline,
            seed=seed,
            threads=threads,
            report=report,
        )
    summary = Summary.of(problem, threads)
    if not obviously_feasible(problem):
        check_feasible(problem)
    reduced = reduce(problem, summary)
    stages = ["greedy-lagrangian"]

    instance = reduced.instance
    unscaled = -reduced.value_exponent
    dual = solve_dual(reduced, threads)
    report("multipliers", None, ldexp(dual.bound, unscaled))
    choice = guided_search(instance, dual)
    if choice is None:
        choice = find_fitting(reduced, dual, threads)
    if choice is None:
        choice = cpsat.find_any(problem, refine_deterministic_time, seed)
        stages.append("cp-sat")
    # At price 0 the favourites have the largest value of each group: no rounding is involved in that proof.
    free = not dual.price.any() and np.array_equal(choice, dual.favourites)
    value = math.fsum(instance.value[choice])
    incumbent = Incumbent(choice, value, value if free else max(value, dual.bound))

    def report_incumbent(stage: str) -> None:
        report(stage, ldexp(incumbent.value, unscaled), ldexp(incumbent.bound, unscaled))

    report_incumbent("guided search")
    if not _closed(incumbent.value, incumbent.bound, gap_tolerance):
        search_core(
            reduced, dual, incumbent, gap_tolerance, seed, refine, threads, lambda _: report_incumbent("beam search")
        )
        stages.append("beam-search")
    choice, value = incumbent.choice, exact_sum(problem.value[incumbent.choice])
    bound = max(value, ldexp(incumbent.bound, unscaled))

    if refine and not _closed(value, bound, gap_tolerance):
        refined = cpsat.refine(problem, reduced, dual, choice, value, bound, refine_deterministic_time, seed)
        if refined is not None:
            choice, value, bound = refined.choice, refined.value, refined.bound
            stages.append("cp-sat")
            report("cp-sat", value, bound)

    if deadline is not None and not _closed(value, bound, gap_tolerance):
        incumbent = Incumbent(choice, ldexp(value, -unscaled), ldexp(bound, -unscaled))
        search_until(reduced, dual, incumbent, gap_tolerance, seed, deadline, lambda _: report_incumbent("long search"))
        choice, value = incumbent.choice, exact_sum(problem.value[incumbent.choice])
        bound = max(value, min(bound, ldexp(incumbent.bound, unscaled)))
        stages.append("long-search")
    used = np.array([exact_sum(row[choice]) for row in problem.cost__ro])
    multipliers = _multipliers(problem, reduced, dual.price)
    return _allocation(problem, choice, used, value, bound, multipliers, gap_tolerance, stages)


def solve_charged(
    problem: AllocationProblem,
    *,
    refine: bool,
    refine_deterministic_time: float,
    gap_tolerance: float,
    deadline: Deadline | None,
    seed: int,
    threads: int,
    report: Report,
) -> Allocation:
    """:func:`solve` of a problem with charges; see :mod:`charged_solver` for the stages."""
    Summary.of(problem, threads)
    check_charges(problem)
    alone = effective(problem)
    if not obviously_feasible(alone):
        check_feasible(alone)
    search = ChargedSearch(problem, gap_tolerance, seed, threads, report)
    search.start()
    if search.choice is None:
        search.offer(cpsat.find_any(problem, refine_deterministic_time, seed))
        search.stages.append("cp-sat")
    search.search(quick=True, prove=False)
    # Where charges leave a gap between the prices' bound and the optimum, CP-SAT often closes it at once.
    first = min(FIRST_CP_SAT, refine_deterministic_time)
    for share in (first, refine_deterministic_time - first) if refine else (0.0,):
        if share and not search.closed():
            search.take(cpsat.refine_charged(search, share, seed))
        search.search(quick=False, prove=refine)
    if deadline is not None:
        search.search_until(deadline)
    found = search.answer()
    assert found.choice is not None
    choice, value, bound = found.choice, found.value, found.bound
    used = true_use(problem, choice)
    return _allocation(problem, choice, used, value, bound, found.multipliers, gap_tolerance, found.stages)


def _allocation(
    problem: AllocationProblem, choice: np.ndarray, used: np.ndarray, value: float, bound: float,
    multipliers: np.ndarray, gap_tolerance: float, stages: Sequence[str],
) -> Allocation:  # fmt: skip
    """The answer, whose exact use is within every budget.

    Raises:
        OptimizationError: it is not: a fault of the search.
    """
    if np.any(used > problem.capacity):
        raise OptimizationError(f"internal: the allocation uses {used} of {problem.capacity}; please report this")
    return Allocation(
        choice=choice,
        value=value,
        upper_bound=bound,
        used=used,
        multipliers=multipliers,
        status="optimal" if _closed(value, bound, gap_tolerance) else "feasible",
        solver=" + ".join(dict.fromkeys(stages)),
    )


def _closed(value: float, bound: float, tolerance: float) -> bool:
    return bound - value <= tolerance * abs(bound)


def _gap(value: float, bound: float) -> float:
    """In per cent of the bound."""
    return 100.0 * (bound - value) / abs(bound) if bound else 100.0 * (bound - value)


def _multipliers(problem: AllocationProblem, reduced: Reduced, price: np.ndarray) -> np.ndarray:
    """Prices in the problem's units; resources that cannot bind cost nothing."""
    multipliers = np.zeros(len(problem.resources))
    with np.errstate(over="ignore"):  # value 1e290 for a budget of 1e-290 is a price beyond float64
        multipliers[reduced.rows] = np.ldexp(price, reduced.scale_exponents - reduced.value_exponent)
    return multipliers
