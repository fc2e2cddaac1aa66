"""A synthetic world in which to see what B-DPO does: ``python -m studies.safety_world``."""
