"""Imported before transformers, which imports torchvision where it is installed (see ``torchvision_import``)."""

from layerlens.integrations.torchvision_import import make_torchvision_importable

make_torchvision_importable()
