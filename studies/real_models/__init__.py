"""DPO, B-DPO and its shuffled control on a real model: ``python -m studies.real_models``."""
