"""The serving benchmark: `python -m benchmarks.serving`; docs/benchmarks.md says what is measured and how."""
