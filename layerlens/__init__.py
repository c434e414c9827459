"""LayerLens: which layers of a pretrained model to adapt, with which PEFT method and rank, under hard budgets."""

__version__ = "0.1.0"
