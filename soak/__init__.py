"""Proofs that take longer than `make test`; their figures are in `docs/reliability.md`."""
