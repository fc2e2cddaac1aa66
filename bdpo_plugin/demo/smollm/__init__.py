"""A pretrained chat model and real preference pairs, without the hub: from the package index.

The model is SmolLM2-135M-Instruct, the pairs are those of LLaMA-Factory's demonstration or a file.
"""

from bdpo_plugin.demo.smollm.writer import write

__all__ = ["write"]
