"""What the choice is compared with: other ways to spend the same number of trained parameters, behind one interface.

Every baseline prepares a model for one and the same training loop (same samples in the same order, same optimiser) and
says how many parameters it trains and keeps. ``baseline`` knows their names; every rank rule (``layerlens.rank_rules``)
is one by its own name.
"""

from layerlens.tuning.baselines.baseline import (
    BASELINES,
    Baseline,
    BaselineRequest,
    Finished,
    Prepared,
    known_baseline,
)

__all__ = ["BASELINES", "Baseline", "BaselineRequest", "Finished", "Prepared", "known_baseline"]
