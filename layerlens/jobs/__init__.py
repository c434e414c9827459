"""What a command does from its configuration to its files, one file for each: run, train, sweep, frontier, costs.

A job reads like a recipe: load, measure, choose, check, write. ``layerlens.pipeline`` is the public door.
"""
