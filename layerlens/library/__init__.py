"""The Python library: it plans on a model, data and trainer in memory. ``import layerlens`` provides its names."""
