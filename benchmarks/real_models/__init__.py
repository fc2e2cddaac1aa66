"""DPO, B-DPO and its shuffled control on a real model: ``python -m benchmarks.real_models``."""
