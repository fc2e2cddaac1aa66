"""What a run costs, beside the host's own: ``python -m benchmarks.NAME --help``."""
