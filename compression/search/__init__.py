"""Recipes that nobody had to write: a search with Optuna, and a size to meet.

Importing this package loads nothing. What it offers: `run.search`, `workload_space.workload_space`, `space.read_space`,
`result.save_recipes`, `target.meet_size` and `scenarios.choose`; `cli` has the commands.
"""
