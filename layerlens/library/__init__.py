"""The library: plans on the model, data and trainer that a program already has. ``import layerlens`` has its names."""
