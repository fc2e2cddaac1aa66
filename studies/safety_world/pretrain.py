"""The tokenizer, and a small model pretrained on the world, kept on disk by content."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version

from studies.safety_world import words
from studies.safety_world.world import World

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_SYSTEM = "helpful"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %} <|system|> " + _SYSTEM + " {% endif %}"
    "{% for message in messages %} <|{{ message['role'] }}|> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: Documents of one optimisation step.
_BATCH = 24
#: Batches that are sorted by length together, so that a batch holds little padding.
_SORTED = 32


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted."""
    texts: list[str] = [_SYSTEM]
    for name, value in vars(words).items():
        if not name.isupper():
            continue
        for part in value.values() if isinstance(value, dict) else [value]:
            if isinstance(part, tuple):
                texts += part
    found = {word for text in texts for word in text.split() if "{" not in word}
    return sorted(found)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a word that the world does not have is spelled by letters."""
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    vocab = [PAD, BOS, END, *_ROLES, *vocabulary()]
    vocab += [x for x in (*letters, *(f"##{letter}" for letter in letters)) if x not in set(vocab)]
    tokenizer = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token=PAD)  # type: ignore
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=list(_ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, hidden: int = 192) -> Any:
    """A Llama of three layers (1.3M parameters at 192) with random weights; float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=3,
        num_attention_heads=hidden // 32,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def render(tokenizer: PreTrainedTokenizerFast, query: str, text: str) -> str:
    """A document as text: a turn of user and assistant, or, without a query, plain text."""
    if not query:
        return f"{BOS} {text} {END}"
    turns = [{"role": "user", "content": query}, {"role": "assistant", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """(B, T) of the rows, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def pretrain(
    world: World, tokenizer: PreTrainedTokenizerFast, *, steps: int, hidden: int = 192
) -> Any:
    """Next-token training from scratch on freshly drawn documents; AdamW, one cosine."""
    model = build_model(tokenizer, seed=world.seed, hidden=hidden).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1
    )
    rng = world.rng("pretraining")
    documents = world.documents(rng)
    done = 0
    while done < steps:
        drawn = itertools.islice(documents, _BATCH * min(_SORTED, steps - done))
        texts = [render(tokenizer, *document) for document in drawn]
        rows = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
        batches = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
        for batch in rng.sample(batches, len(batches)):
            ids = pad(batch, -1)
            labels = ids.masked_fill(ids < 0, -100)
            # causal, padded on the right: no mask is needed
            model(input_ids=ids.clamp(min=0), labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
    return model.eval()


def source_digest(*names: str) -> str:
    """Of modules of this folder, by name, and of the versions that a result depends on."""
    digest = hashlib.blake2b(f"{torch.__version__} {transformers_version}".encode(), digest_size=6)
    for name in names:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


def pretrained(seed: int, folder: Path, *, steps: int, hidden: int = 192) -> Path:
    """The folder of a seed's pretrained model and tokenizer, made if it is not there."""
    made = source_digest("words", "world", "pretrain")
    target = folder / f"seed{seed}-steps{steps}-hidden{hidden}-{made}"
    if not target.exists():
        temporary = folder / f".{target.name}.{os.getpid()}"
        tokenizer = build_tokenizer()
        model = pretrain(World(seed), tokenizer, steps=steps, hidden=hidden)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if target.exists():  # another process was faster
            shutil.rmtree(temporary)
        else:
            temporary.rename(target)
    return target
