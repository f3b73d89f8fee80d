"""The guardrail benchmark: `python -m benchmarks.guardrails`; docs/guardrail-benchmarks.md says what it measures."""
