"""What a model does after a training: the answers that it likes better, and those that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from bdpo_plugin.model.reader import ResponseReader
from studies.real_models.design import Sizes
from studies.real_models.material import Material
from studies.real_models.refusal import generate

_ROWS = 16


class Likelihoods:
    """Log-probabilities of answers under a model.

    Args:
        tokenizer: with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(
        self, model: nn.Module, asked: Sequence[tuple[list[dict[str, str]], str]]
    ) -> list[tuple[float, int]]:
        """Of each conversation and answer: nats, end of turn included, and tokens."""
        rows = [self._row(messages, answer) for messages, answer in asked]
        found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
        # the answers to one prompt beside each other: the reader runs it once
        order = sorted(range(len(rows)), key=lambda i: (rows[i][1], rows[i][0]))
        reader = ResponseReader()
        for start in range(0, len(order), _ROWS):
            places = order[start : start + _ROWS]
            sums = self._batch(reader, model, [rows[i] for i in places])
            for i, value in zip(places, sums.tolist(), strict=True):
                found[i] = value, len(rows[i][0]) - rows[i][1]
        return found

    def _row(self, messages: list[dict[str, str]], answer: str) -> tuple[list[int], int]:
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        before = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*before, *after, self.tokenizer.eos_token_id], len(before)

    def _batch(
        self, reader: ResponseReader, model: nn.Module, rows: Sequence[tuple[list[int], int]]
    ) -> Tensor:
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (row, prompt) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
            answer[i, prompt : len(row)] = True
        device = next(model.parameters()).device
        ids, mask, answer = ids.to(device), mask.to(device), answer.to(device)
        with torch.no_grad():
            said, _ = reader.token_statistics(
                model, answer.roll(-1, 1), ids[answer], input_ids=ids, attention_mask=mask
            )
        each = torch.zeros(answer.shape, device=device).masked_scatter(answer, said.logps)
        return each.double().sum(1)


class Evaluation:
    """The measures, with what the untrained model says of the same answers.

    Args:
        reference: the model before training.
    """

    def __init__(
        self, material: Material, reference: nn.Module, tokenizer: Any, sizes: Sizes, rows: int
    ) -> None:
        self.material, self.tokenizer, self.sizes, self.rows = material, tokenizer, sizes, rows
        self.logps = Likelihoods(tokenizer)
        self._asked = self._questions()
        self._before = self.logps(reference, self._asked)

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """The :meth:`preferences`, and ``answers``: set -> the greedy answers."""
        return self.preferences(model) | {
            "answers": {
                name: generate(
                    model, self.tokenizer, prompts, batch=self.rows, tokens=self.sizes.answer
                )
                for name, prompts in self.material.prompts.items()
            }
        }

    def preferences(self, model: nn.Module) -> dict[str, Any]:
        """Every measure of log-probabilities, of each prompt: they can be paired and resampled.

        ``choice``: of each held-out prompt of XSTest the share of its (wanted, unwanted) answers in
        which the wanted one is likelier for each token; ``choice_margin``: its mean advantage, nats
        per token; ``reward``: the same share by the log-ratio to the untrained model, in nats per
        answer; ``hh_accuracy``, ``hh_margin`` (nats): of held-out pairs; ``nll``: nats per token of
        ordinary answers.
        """
        after = self.logps(model, self._asked)
        per_token = [nats / tokens for nats, tokens in after]
        gained = [a[0] - b[0] for a, b in zip(after, self._before, strict=True)]
        found: dict[str, Any] = {"choice": [], "choice_margin": [], "reward": [], "unsafe": []}
        place = 0
        for choice in self.material.choices:
            refusals = range(place, place + len(choice.refusals))
            place = refusals.stop + len(choice.helps)
            helps = range(refusals.stop, place)
            wanted, other = (refusals, helps) if choice.unsafe else (helps, refusals)
            both = [(i, j) for i in wanted for j in other]
            found["choice"].append(fmean(per_token[i] > per_token[j] for i, j in both))
            found["choice_margin"].append(fmean(per_token[i] - per_token[j] for i, j in both))
            found["reward"].append(fmean(gained[i] > gained[j] for i, j in both))
            found["unsafe"].append(choice.unsafe)
        pairs = range(place, place + 2 * len(self.material.hh_held_out), 2)
        margins = [gained[i] - gained[i + 1] for i in pairs]
        found["hh_margin"] = margins
        found["hh_accuracy"] = [float(margin > 0) for margin in margins]
        found["nll"] = [-value for value in per_token[pairs.stop :]]
        return found

    def _questions(self) -> list[tuple[list[dict[str, str]], str]]:
        asked = []
        for choice in self.material.choices:
            messages = [{"role": "user", "content": choice.prompt}]
            asked += [(messages, answer) for answer in (*choice.refusals, *choice.helps)]
        for pair in self.material.hh_held_out:
            asked += [(pair["messages"], pair[side]["content"]) for side in ("chosen", "rejected")]
        return asked + self.material.ordinary
