"""`python -m benchmarks.guardrails`."""

from benchmarks.guardrails.cli import main

main()
