"""Samples for calibration and training: built-in ones, files of the user, and data sets of the Hugging Face hub."""

from layerlens.data.dataset import Dataset
from layerlens.data.load import load_dataset

__all__ = ["Dataset", "load_dataset"]
