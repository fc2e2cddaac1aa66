"""A pretrained chat model and real preference pairs, from the package index instead of the hub.

The model is SmolLM2-135M-Instruct. The pairs come from LLaMA-Factory's demonstration data or from a
file of the user.
"""

from bdpo_plugin.demo.smollm.writer import write

__all__ = ["write"]
