"""Computes the scores and the balance weights of a run's preference pairs. The trainers of all
hosts use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.data.recorded_sources import is_recording
from bdpo_plugin.model.probe import Capabilities
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.objective import BalanceWeights
from bdpo_plugin.output.score_file import save_scores
from bdpo_plugin.output.tables import print_problems, print_scores, print_settings, print_warning
from bdpo_plugin.output.weighing_record import active_settings, callable_record, in_words
from bdpo_plugin.reference.batches import token_budget
from bdpo_plugin.reference.fingerprint import UnreadableReference
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.reference.null_prompt import find_null_prompt
from bdpo_plugin.reference.score_pairs import PairScores, score_dataset, score_pairs
from bdpo_plugin.reference.store import ScoreStore
from bdpo_plugin.settings import UNIMPORTANT, BDPOError, BDPOSettings
from bdpo_plugin.training.checkpoints import COMPUTATION, NULL_PROMPT, REFERENCE
from bdpo_plugin.training.datasets import Usable
from bdpo_plugin.training.main_rank import by_main
from bdpo_plugin.training.model_warnings import (
    layout_in_words,
    length_warnings,
    padding_warnings,
)
from bdpo_plugin.training.output_lock import lock_output
from bdpo_plugin.training.position_limit import check_room
from bdpo_plugin.training.reference_identity import Identity, identify
from bdpo_plugin.training.score_columns import longest, score_columns
from bdpo_plugin.training.weighing import Weigh, weights_of


class Scorer:
    """Scores and weights the pairs of one run. When it is made, it finds the null prompt and prints
    the settings of the run.

    Args:
        settings: the settings of the run.
        output_dir: the output folder, to which ``bdpo/reference_scores*.parquet`` is written.
        seed: the seed of the run, for its control.
        weigh: replaces :func:`balance_weights`; see :class:`BDPOTrainer`.
        pairs: the pairs whose prompts determine the null prompt.
        reference: the reference; with `bdpo_precompute`, one that can run now.

    Attributes:
        weighing: a record of `weigh`; None if the settings decide the weights.
        reader: the reader of the run, which also reads the policy in training steps.
        identity: the identity of the reference that scored the last dataset; None if it cannot be
            determined.
        reuse: for each dataset scored before training, the numbers of pairs scored now and reused.
    """

    def __init__(
        self,
        settings: BDPOSettings,
        tokenizer: Any,
        accelerator: Accelerator,
        output_dir: str,
        seed: int,
        weigh: Weigh | None,
        *,
        pairs: Sequence[Pair],
        reference: Reference,
    ) -> None:
        tokens = settings.score_tokens or token_budget(reference.model, accelerator.device)
        self.settings = replace(settings, score_tokens=tokens)
        self.tokenizer = tokenizer
        self.accelerator = accelerator
        self.output_dir = Path(output_dir, "bdpo")
        self.seed = seed
        self.weigh = weigh
        # recorded before the first call, because a call may change the callable
        self.weighing = None if weigh is None else callable_record(weigh)
        self.reader = ResponseReader()
        self.identity: Identity | None = None
        self.reuse: dict[str, dict[str, int]] = {}
        self._stores: dict[tuple[str, ...], ScoreStore] = {}
        self._unreadable = False
        prompts = [pair.chosen.prompt_ids for pair in pairs]
        self.null_prompt = find_null_prompt(tokenizer, prompts, settings.null_prompt)
        by_main(
            accelerator.is_main_process,
            lambda: setattr(self, "_lock", lock_output(output_dir)),
            f"lock {output_dir}",
        )
        warnings = length_warnings(pairs, self.reader.traits(reference.model).rotary_limit)
        batches = None
        if settings.precompute and pairs:  # without `precompute` the model may not run yet
            can = self._probe(reference, pairs)
            batches = layout_in_words(can.rows)
            warnings += padding_warnings(can.padding)
        if accelerator.is_main_process:
            print_settings(
                self.settings,
                reference.description,
                self.null_prompt,
                weighing=in_words(self.weighing) if self.weighing else None,
                batches=batches,
                warnings=warnings,
            )

    def _probe(self, reference: Reference, pairs: Sequence[Pair]) -> Capabilities:
        """Probes the reference on the longest sequence of the pairs."""
        at = int(longest(pairs).argmax())
        side = max(pairs[at], key=lambda side: len(side.prompt_ids) + len(side.completion_ids))
        ids = torch.from_numpy(np.concatenate([side.prompt_ids, side.completion_ids]))[None].long()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with reference.activated() as model:
            return self.reader.probe(model, inputs, self.accelerator.device)

    def description(self, training_pairs: Mapping[str, str]) -> dict[str, Any]:
        """Describes for the checkpoints everything that decides the scores and weights of the
        training pairs.

        Args:
            training_pairs: the result of
                :func:`~bdpo_plugin.training.datasets.description_of`.
        """
        settings = active_settings(self.settings, weigh=self.weigh is not None)
        return {
            "settings": {k: v for k, v in settings.items() if k not in UNIMPORTANT},
            "weigh": self.weighing,
            NULL_PROMPT: list(self.null_prompt.ids),
            **training_pairs,
            **(self._identity_record() if self.settings.precompute else {}),
        }

    def _identity_record(self) -> dict[str, list[str] | None]:
        weights, computation = self.identity or (None, None)
        return {REFERENCE: weights, COMPUTATION: computation}

    def score(self, usable: Usable, reference: Reference) -> PairScores:
        """Returns the scores of the B pairs of a dataset, from the store or computed now.

        Args:
            usable: the rows of the dataset that can be trained on, the same in every rank.
        """
        try:
            self.identity = identify(reference, self.tokenizer, self.accelerator)
        except UnreadableReference as error:
            self.identity = None
            if self.accelerator.is_main_process and not self._unreadable:
                print_warning(
                    f"{error}. So no later run can know that its reference is the same: the scores "
                    "are used by this run alone and kept only in its output folder."
                )
            self._unreadable = True
        scores = score_dataset(
            usable.pairs,
            reference,
            self.null_prompt,
            self.settings,
            reader=self.reader,
            device=self.accelerator.device,
            store=self._store(self.identity),
            name=usable.name,
            rows=usable.rows,
            with_mi=self._measures,
        )
        now = int(scores.computed.sum())
        self.reuse[usable.name] = {"scored now": now, "reused": len(usable.pairs) - now}
        return scores

    def save(
        self, usable: Usable, scores: PairScores, weights: BalanceWeights, *, file: str
    ) -> None:
        """Prints a summary of the scores and the weights of a dataset, and writes them to a file of
        the output folder."""
        if self.accelerator.is_main_process:
            print_scores(usable.name, self.settings, scores, weights)
        path = self.output_dir / file
        by_main(
            self.accelerator.is_main_process,
            lambda: save_scores(
                path,
                usable.rows,
                scores,
                weights,
                self.settings,
                usable.groups,
                weighing=self.weighing,
            ),
            f"write {path}",
        )

    def _store(self, identity: Identity | None) -> ScoreStore:
        """Returns the store of a reference. All its datasets use one store, so that a problem is
        reported once."""
        digests = None if identity is None else (*identity.weights, *identity.computation)
        show = partial(print_problems, title="problems with the stored scores")
        store = ScoreStore(self.settings.cache_dir, digests, show)
        return self._stores.setdefault(digests or (), store)

    def scores_record(self) -> dict[str, Any] | None:
        """Returns for the run record the identity of the reference, the numbers of scored and
        reused pairs, and the result of verifying reused scores; None if each batch is scored in its
        training step."""
        if not self.settings.precompute:
            return None
        verified = [store.verified for store in self._stores.values()]
        greatest = max((one.difference for one in verified), default=0.0)
        return {
            "identity": self._identity_record(),
            "pairs": self.reuse,
            "verified": {
                "scores": sum(one.scores for one in verified),
                "beyond rounding": sum(one.beyond for one in verified),
                "greatest difference": greatest if isfinite(greatest) else None,
            },
        }

    def score_batch(self, pairs: Sequence[Pair], reference: Reference) -> dict[str, Tensor]:
        """Computes the :data:`SCORE_COLUMNS` of a batch, each (B,); they are not stored.

        Raises:
            BDPOError: A response has no token.
        """
        if any(not len(side.completion_ids) for pair in pairs for side in pair):
            raise BDPOError(
                "A pair of this batch has no response token left after truncation. Streaming data "
                "cannot be checked in advance: filter such pairs out."
            )
        self.check_room(pairs, None, reference)
        scores = score_pairs(
            pairs,
            reference,
            self.null_prompt,
            self.settings,
            reader=self.reader,
            device=self.accelerator.device,
            with_mi=self._measures,
        )
        columns = score_columns(scores, self.weights(scores))
        return {name: column.to(self.accelerator.device) for name, column in columns.items()}

    def check_room(
        self, pairs: Sequence[Pair], rows: Sequence[int] | None, reference: Reference
    ) -> None:
        """Refuses pairs that are longer than the position limit of the reference; `rows` is None
        for a batch.

        Raises:
            BDPOError: A pair is too long.
        """
        limit = self.reader.traits(reference.model).position_limit
        null = len(self.null_prompt.ids) if self._measures else 0
        check_room(pairs, rows, null, limit)

    @property
    def _measures(self) -> bool:
        """Whether this run needs the mutual information."""
        s = self.settings
        return s.weighs or s.control is not None or self.weigh is not None or is_recording()

    def weights(self, scores: PairScores, usable: Usable | None = None) -> BalanceWeights:
        """Computes the weights of B pairs from their scores; see
        :func:`~bdpo_plugin.training.weighing.weights_of`.

        Args:
            usable: the dataset that they are of; None for a batch.
        """
        groups, columns = (usable.groups, usable.columns) if usable else (None, {})
        return weights_of(
            scores, self.settings, weigh=self.weigh, columns=columns, groups=groups, seed=self.seed
        )
