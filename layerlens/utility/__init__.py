"""Utility models: from the statistics of a layer to the expected gain of every (method, rank) on it.

Every model is a ``UtilityModel`` in a file of its own, listed in ``layerlens.registry.UTILITY_MODELS`` with what its
numbers mean. Utilities of one table are comparable over layers, methods and ranks; "none" has 0.
"""

from layerlens.utility.model import UtilityModel, calibrated_table, model_for, needed_statistics, utility_table
from layerlens.utility.weighted import metrics_from_cache, weighted_table

__all__ = [
    "UtilityModel",
    "calibrated_table",
    "metrics_from_cache",
    "model_for",
    "needed_statistics",
    "utility_table",
    "weighted_table",
]
