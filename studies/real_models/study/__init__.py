"""B-DPO, DPO and the controls on SmolLM2-135M, by a plan written beforehand (PLAN.md)."""
