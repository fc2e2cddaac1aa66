"""Many configurations of the hosts, each run with the host's own DPO and with ``bdpo_alpha: 0``.

``python -m soak.hosts`` runs them all and prints a table; see `docs/reliability.md`.
"""
