"""Others' rules of where LoRA rank goes within a budget, one object each, by name in ``layerlens.registry.RANK_RULES``.

A rule is a pure function of the layers, the budget, what was measured of each layer, and a seed. `layerlens train
--baseline`, `layerlens evaluate` and the study in ``benchmarks/evaluation`` measure what a rule needs and call it.
"""

from layerlens.rank_rules.rule import QUANTITIES, Measured, RankRule, Ranks, params_of, rank_cost

__all__ = ["QUANTITIES", "Measured", "RankRule", "Ranks", "params_of", "rank_cost"]
