"""Mutual information of the world's pairs, by the package's own pass over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdpo_plugin.data.pairs import Pair as TokenPair
from bdpo_plugin.data.pairs import Side
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.reference.fingerprint import AS_IT_IS, model_fingerprint, tokenizer_fingerprint
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.reference.null_prompt import NullPrompt, find_null_prompt
from bdpo_plugin.reference.score_pairs import PairScores, score_dataset, score_pairs
from bdpo_plugin.reference.store import ScoreStore
from bdpo_plugin.settings import BDPOSettings
from studies.safety_world.world import Pair, World

#: Queries that the reading ``marginal`` averages over.
MARGINAL_QUERIES = 16
#: A query that asks for nothing, for the null prompt "placeholder".
PLACEHOLDER = "please explain how to do that ."


class Information:
    """Scores of pairs under one frozen model, by any null prompt and estimator.

    Args:
        model, tokenizer: of the reference.
        cache: folder of the package's score store; None keeps nothing.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: Path | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.reader = ResponseReader()
        self.reference = Reference(model, "the pretrained model", adapter=AS_IT_IS)
        self.store = None
        if cache:
            # as a trainer without mixed precision names it, so that their scores are shared
            model_id = model_fingerprint(model, adapter=AS_IT_IS, compute="no")
            identity = (*model_id, tokenizer_fingerprint(tokenizer))
            self.store = ScoreStore(cache, identity)

    def prompt_ids(self, query: str) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": query}], add_generation_prompt=True, tokenize=False
        )
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def null_prompt(self, name: str, pairs: Sequence[Pair]) -> NullPrompt:
        """``scaffold`` (what the package derives), ``placeholder``, ``bos``, or a query's text."""
        if name == "scaffold":
            return find_null_prompt(
                self.tokenizer, [self.prompt_ids(pair.query.text) for pair in pairs]
            )
        if name == "bos":
            return NullPrompt((self.tokenizer.bos_token_id,), name, name)
        query = PLACEHOLDER if name == "placeholder" else name
        return NullPrompt(tuple(self.prompt_ids(query)), query, name)

    def token_pairs(self, pairs: Sequence[Pair]) -> list[TokenPair]:
        made = []
        for pair in pairs:
            prompt = self.prompt_ids(pair.query.text)
            turns = pair.to_trl()
            whole = [
                self._ids(
                    self.tokenizer.apply_chat_template(
                        turns["prompt"] + turns[side], tokenize=False
                    )
                )
                for side in ("chosen", "rejected")
            ]
            made.append(
                TokenPair(*(Side(np.array(prompt), np.array(ids[len(prompt) :])) for ids in whole))
            )
        return made

    def scores(self, pairs: Sequence[Pair], null: str = "scaffold", **settings: Any) -> PairScores:
        """`settings`: fields of :class:`BDPOSettings` (``mi_estimator``, ``mi_normalize``)."""
        return self._scores(self.token_pairs(pairs), self.null_prompt(null, pairs), **settings)

    def _scores(self, pairs: list[TokenPair], null: NullPrompt, **settings: Any) -> PairScores:
        given = (pairs, self.reference, null, BDPOSettings(**settings))
        common = {"reader": self.reader, "device": torch.device("cpu")}
        if self.store is None:
            return score_pairs(*given, **common)
        return score_dataset(*given, **common, store=self.store)

    def marginal(self, pairs: Sequence[Pair], queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """MI against log pi(y) = log-mean-exp over the queries of log pi(y | x_k).

        Returns:
            two (B,) tensors, chosen and rejected, nats per token.
        """
        own, null = self.token_pairs(pairs), self.null_prompt("scaffold", pairs)
        prompts = [np.array(self.prompt_ids(query)) for query in queries]
        crossed = [
            TokenPair(*(side._replace(prompt_ids=prompt) for side in pair))
            for prompt in prompts
            for pair in own
        ]
        given, over = self._scores(own, null), self._scores(crossed, null)

        def information(logps: Tensor, others: Tensor, lengths: Tensor) -> Tensor:
            mean = torch.logsumexp(others.view(len(prompts), -1), dim=0) - math.log(len(prompts))
            return (logps - mean) / lengths

        return (
            information(given.ref_chosen_logps, over.ref_chosen_logps, given.chosen_tokens),
            information(given.ref_rejected_logps, over.ref_rejected_logps, given.rejected_tokens),
        )


def other_queries(
    world: World, count: int, pairs: Sequence[Pair], purpose: str = "marginal"
) -> list[str]:
    """Queries as the preference data has them, none of them one of `pairs`, for the marginal."""
    own = {pair.query.text for pair in pairs}
    drawn = [pair.query.text for pair in world.pairs(count + len(pairs), purpose)]
    return [query for query in drawn if query not in own][:count]


def survey(
    model: Any, tokenizer: Any, world: World, *, pool: int, compared: int, queries: int
) -> dict[str, Any]:
    """Experiment 1: the MI of a pool of pairs, and how the ways to measure it agree.

    Args:
        pool: pairs whose MI is reported.
        compared: pairs that the marginal over `queries` other queries is computed for too.

    Returns:
        ``pairs``: kind, types, MI (nats per token) and tokens of each; ``agreement``: "null
        prompt, estimator" -> share of the pairs on which it gives I_w - I_l the sign that the
        marginal gives, and their correlation.
    """
    pairs, information = world.pairs(pool, "training"), Information(model, tokenizer)
    scores = information.scores(pairs)
    columns = zip(*(column.tolist() for column in scores[2:6]), strict=True)
    few = pairs[:compared]
    others = other_queries(world, queries, few)
    chosen, rejected = information.marginal(few, others)
    truth = chosen - rejected
    ways = {
        f"{null}, {estimator}": (null, {"mi_estimator": estimator})
        for null in ("scaffold", "placeholder", "bos")
        for estimator in ("pointwise", "expected")
    }
    differences = {
        f"marginal over {MARGINAL_QUERIES} queries": _marginal_of_few(
            information, few, world, others
        )
    }
    for name, (null, settings) in ways.items():
        found = information.scores(few, null, **settings)
        differences[name] = found.mi_chosen - found.mi_rejected
    return {
        "pairs": [
            {
                "kind": pair.query.kind,
                "types": [pair.chosen.type, pair.rejected.type],
                "mi": [mi_chosen, mi_rejected],
                "tokens": [chosen_tokens, rejected_tokens],
            }
            for pair, (mi_chosen, mi_rejected, chosen_tokens, rejected_tokens) in zip(
                pairs, columns, strict=True
            )
        ],
        "agreement": {
            name: {
                "sign": float(((difference > 0) == (truth > 0)).float().mean()),
                "correlation": float(torch.corrcoef(torch.stack([difference, truth]))[0, 1]),
            }
            for name, difference in differences.items()
        },
    }


def _marginal_of_few(
    information: Information, pairs: Sequence[Pair], world: World, others: Sequence[str]
) -> Tensor:
    """As the reading ``marginal`` has it, of queries that `others` are not among."""
    drawn = other_queries(world, MARGINAL_QUERIES + len(others), pairs, "few")
    queries = [query for query in drawn if query not in set(others)][:MARGINAL_QUERIES]
    chosen, rejected = information.marginal(pairs, queries)
    return chosen - rejected
