"""Offline half of Trimtab: a workload and a recipe go in, a variant with a scorecard and a verdict comes out.

Importing this package, `compression.workload` or `compression.variant` loads neither torch nor pandas nor
ONNX Runtime, because the serving workers import them too.
"""
