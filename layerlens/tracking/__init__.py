"""Experiment tracking: what a job was asked, chose and measured, told to MLflow, TensorBoard, or a tracker of yours."""

from layerlens.tracking.observer import tracking_observers
from layerlens.tracking.protocol import Tracker

__all__ = ["Tracker", "tracking_observers"]
