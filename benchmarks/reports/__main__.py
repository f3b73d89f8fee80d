"""`python -m benchmarks.reports`."""

from benchmarks.reports.cli import main

if __name__ == "__main__":  # the measured process imports this again
    main()
