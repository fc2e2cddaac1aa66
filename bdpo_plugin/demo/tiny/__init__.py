"""A tiny chat model and its preference data, made without downloads, for the demo and the tests.

The tokenizer, the model and the text all come from a small grammar of harmless questions. Imports
torch and transformers, but neither trl nor a host.
"""

from bdpo_plugin.demo.tiny.conversations import preference_pairs, to_trl
from bdpo_plugin.demo.tiny.model import build_model, build_tokenizer
from bdpo_plugin.demo.tiny.pretrain import pretrain
from bdpo_plugin.demo.tiny.writer import write

__all__ = [
    "build_model",
    "build_tokenizer",
    "preference_pairs",
    "pretrain",
    "to_trl",
    "write",
]
