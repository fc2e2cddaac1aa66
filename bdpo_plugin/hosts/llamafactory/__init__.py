"""Adapter for LLaMA-Factory: `stage: dpo` with `pref_loss: bdpo` (see autoload.py)."""
