"""A tiny chat model and its preference data, made from nothing: the demo's and the tests' own.

No network, no download: the tokenizer, the model and the text all come from a small grammar of
harmless questions. Imports torch and transformers, no trl and no host.
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
