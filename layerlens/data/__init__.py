"""Labelled texts for calibration: built-in ones, and files of the user."""

from layerlens.data.dataset import TextDataset
from layerlens.data.sources import load_dataset

__all__ = ["TextDataset", "load_dataset"]
