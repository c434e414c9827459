"""What the choice is compared with: other ways to spend the same number of trained parameters, behind one interface.

Every baseline prepares a model for one and the same training loop (same samples in the same order, same optimiser) and
says how many parameters it trains and keeps. One file for each; ``registry`` knows their names.
"""

from layerlens.tuning.baselines.interface import BaselineRequest, Finished, Prepared
from layerlens.tuning.baselines.registry import BASELINES, Baseline, known_baseline

__all__ = ["BASELINES", "Baseline", "BaselineRequest", "Finished", "Prepared", "known_baseline"]
