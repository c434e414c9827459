"""The rooms that know how torch, torchvision, transformers, ultralytics and PEFT models are built and named."""

from layerlens.integrations import torchvision as _torchvision

_torchvision.watch()  # before any of those libraries imports it
