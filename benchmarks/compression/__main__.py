"""`python -m benchmarks.compression`."""

from benchmarks.compression.cli import main

if __name__ == "__main__":
    main()
