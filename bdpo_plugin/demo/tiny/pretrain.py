"""Pretrains the tiny model until it generates readable text."""

from __future__ import annotations

import random

import torch
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bdpo_plugin.demo.tiny.conversations import conversation


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Trains the model in place on randomly drawn conversations, with AdamW and a cosine schedule.

    The objective is next-token prediction.

    Returns:
        The mean loss of the last ten steps, in nats per token.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=max(steps, 2), pct_start=0.1
    )
    losses: list[float] = []
    model.train()
    for _ in track(range(steps), description="Pretraining", disable=not progress):
        texts = [
            tokenizer.apply_chat_template(conversation(rng), tokenize=False)
            for _ in range(batch_size)
        ]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-10:]) / max(len(losses[-10:]), 1)
