"""What a run of any host needs: its data, its scores, its step, and what it tells."""
