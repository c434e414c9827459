"""Experiment tracking: sends the settings, choice and figures of a job to MLflow, TensorBoard, W&B or your tracker."""

from layerlens.tracking.observer import tracking_observers
from layerlens.tracking.protocol import Tracker

__all__ = ["Tracker", "tracking_observers"]
