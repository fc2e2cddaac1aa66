"""From the preference pairs of a run to their scores and weights, whoever the host is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.traits import rotary_limit
from bdpo_plugin.objective import BalanceWeights, balance_weights
from bdpo_plugin.pairs import Pair, check_pairs
from bdpo_plugin.reference.dataset import PairScores, score_pairs
from bdpo_plugin.reference.fingerprint import (
    UnreadableWeights,
    model_fingerprint,
    tokenizer_fingerprint,
)
from bdpo_plugin.reference.null_prompt import NullPrompt, find_null_prompt
from bdpo_plugin.reference.reference import Reference
from bdpo_plugin.reference.store import ScoreStore
from bdpo_plugin.run.columns import LENGTH, SCORE_COLUMNS
from bdpo_plugin.run.continuing import OutputFolder
from bdpo_plugin.run.report import (
    print_problems,
    print_scores,
    print_settings,
    print_store_problems,
    print_warning,
    save_scores,
)
from bdpo_plugin.run.room import check_room, position_limit
from bdpo_plugin.settings import BDPOError, BDPOSettings

Balance = Callable[[Tensor, Tensor], BalanceWeights]


class Balancer:
    """Checks, scores and weighs the pairs of one run, and tells the user about it.

    Args:
        settings: of the run.
        tokenizer: of the run.
        accelerator: of the run.
        output_dir: where ``bdpo/reference_scores*.parquet`` goes.
        balance: in the place of :func:`balance_weights`; see :class:`BDPOTrainer`.
    """

    def __init__(
        self,
        settings: BDPOSettings,
        tokenizer: Any,
        accelerator: Accelerator,
        output_dir: str,
        balance: Balance | None = None,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.accelerator = accelerator
        self.output_dir = Path(output_dir, "bdpo")
        self._folder = OutputFolder.take(output_dir) if accelerator.is_main_process else None
        self.balance = balance
        self.reader = ResponseReader()
        self.null_prompt: NullPrompt | None = None
        self._reference: list[str] | None = None
        self._stores: dict[tuple[str, ...], ScoreStore] = {}
        self._training_pairs: str | None = None
        self._told_unreadable = False

    def description(self) -> dict[str, Any]:
        """What decides the scores and weights of this run's training pairs, for its checkpoints.

        The reference is None where its weights have not been read (``bdpo_precompute: false``).
        """
        unimportant = ("bdpo_precompute", "bdpo_score_tokens", "bdpo_cache_dir", "bdpo_null_prompt")
        settings = {k: v for k, v in self.settings.to_keys().items() if k not in unimportant}
        return {
            "settings": settings | {"balance": getattr(self.balance, "__qualname__", None)},
            "null prompt": list(self.null_prompt.ids) if self.null_prompt else None,
            "reference": self._reference,
            "training pairs": self._training_pairs,
        }

    def take_training_pairs(self, pairs: Sequence[Pair]) -> None:
        """Remember which pairs are trained on."""
        self._training_pairs = digest(pairs)

    def usable_rows(
        self,
        pairs: Sequence[Pair],
        name: str,
        lengths: Sequence[tuple[int, int]],
        misplaced: Iterable[int] = (),
        rows: Sequence[int] | None = None,
    ) -> list[int]:
        """The positions of the pairs that can teach something; what is wrong is printed.

        Args:
            pairs: of a whole dataset, after truncation.
            name: of the dataset.
            lengths: response tokens (chosen, rejected) of each pair before truncation.
            misplaced: positions whose prompt is known not to end where the response begins.
            rows: the numbers of the pairs in the user's dataset; default their position.

        Raises:
            BDPOError: no pair is left.
        """
        report = check_pairs(
            pairs,
            name,
            lengths=lengths,
            bos=self.tokenizer.bos_token_id,
            misplaced=misplaced,
            is_blank=self.is_blank,
            numbers=rows,
        )
        if self.accelerator.is_main_process:
            print_problems(report.lines())
        report.raise_if_nothing_left()
        dropped = report.dropped
        return [row for row in range(len(pairs)) if row not in dropped]

    def is_blank(self, response: np.ndarray) -> bool:
        """Whether the tokens of a response are no text."""
        # no end of turn takes more tokens
        return len(response) <= 8 and not (
            self.tokenizer.decode(response, skip_special_tokens=True).strip()
        )

    def find_null_prompt(self, pairs: Sequence[Pair], reference: Reference) -> None:
        """Settle the null prompt on the training pairs, and print what the run resolved to."""
        self.null_prompt = find_null_prompt(
            self.tokenizer,
            [pair.chosen.prompt for pair in pairs],
            self.settings.null_prompt,
        )
        if self.accelerator.is_main_process:
            print_settings(
                self.settings,
                reference.description,
                self.null_prompt,
                custom=self.balance is not None,
                warnings=_long_sequences(pairs, rotary_limit(reference.model)),
            )

    def score_dataset(
        self, pairs: Sequence[Pair], rows: Sequence[int], name: str, reference: Reference, file: str
    ) -> dict[str, Tensor]:
        """:data:`SCORE_COLUMNS` of a dataset, each (B,), from the store or computed now.

        And :data:`LENGTH`.

        Args:
            pairs: the usable pairs, the same in every rank.
            rows: their numbers in the host's dataset.
            name: of the dataset, for the user.
            file: name of the Parquet file that they are saved to.
        """
        if self.null_prompt is None:
            self.find_null_prompt(pairs, reference)
        check_room(pairs, rows, len(self.null_prompt.ids), position_limit(reference.model))
        self._reference = self._identify(reference)
        scores = score_pairs(
            pairs,
            reference,
            self.null_prompt,
            self.settings,
            reader=self.reader,
            device=self.accelerator.device,
            store=self._store(),
            name=name,
            rows=rows,
        )
        weights = self._weigh(scores)
        if self.accelerator.is_main_process:
            print_scores(name, self.settings, scores, weights)
            save_scores(self.output_dir / file, rows, scores, weights, self.settings)
        return _columns(scores, weights) | {LENGTH: longest(pairs)}

    def _identify(self, reference: Reference) -> list[str] | None:
        """What the scores of this run are found by again, the same in every rank; None, and said
        once, where the reference's weights cannot be read."""
        fingerprint, why = None, ""
        try:
            fingerprint = model_fingerprint(
                self.accelerator.unwrap_model(reference.model),
                adapter=reference.adapter,
                compute=self.accelerator.mixed_precision,
            )
        except UnreadableWeights as error:
            why = str(error)
        # each rank may hold a shard of the model: the reference is what all of them hold
        parts = gather_object([(fingerprint, why)])
        reasons = [why for fingerprint, why in parts if fingerprint is None]
        if not reasons:
            return [*sorted({part for part, _ in parts}), tokenizer_fingerprint(self.tokenizer)]
        if self.accelerator.is_main_process and not self._told_unreadable:
            print_warning(
                f"{reasons[0]}. So no later run can tell that its reference is this one: the "
                "scores are computed for this run alone and kept nowhere but in its output."
            )
        self._told_unreadable = True
        return None

    def _store(self) -> ScoreStore:
        """For all datasets of this reference, so that a problem is told once."""
        store = ScoreStore(self.settings.cache_dir, self._reference, print_store_problems)
        return self._stores.setdefault(tuple(self._reference or ()), store)

    def score_batch(self, pairs: Sequence[Pair], reference: Reference) -> dict[str, Tensor]:
        """:data:`SCORE_COLUMNS` of a batch, each (B,), computed now and not kept.

        Raises:
            BDPOError: a response has no token.
        """
        if any(not len(side.response) for pair in pairs for side in pair):
            raise BDPOError(
                "A pair of this batch has no response token left after truncation. Streaming data "
                "cannot be checked in advance: filter such pairs out."
            )
        check_room(pairs, None, len(self.null_prompt.ids), position_limit(reference.model))
        scores = score_pairs(
            pairs,
            reference,
            self.null_prompt,
            self.settings,
            reader=self.reader,
            device=self.accelerator.device,
        )
        columns = _columns(scores, self._weigh(scores))
        return {name: column.to(self.accelerator.device) for name, column in columns.items()}

    def _weigh(self, scores: PairScores) -> BalanceWeights:
        mi = (scores.mi_chosen, scores.mi_rejected)
        if self.balance is None:
            return balance_weights(
                *mi,
                alpha=self.settings.alpha,
                weighting=self.settings.weighting,
                balance=self.settings.balance,
                scaling=self.settings.scaling,
            )
        weights = BalanceWeights(*(t.detach().float() for t in self.balance(*mi)))
        if any(t.shape != mi[0].shape or not t.isfinite().all() for t in weights):
            raise BDPOError(
                "The `balance` callable must return three finite tensors of the shape of its "
                f"arguments, {tuple(mi[0].shape)}: chosen, rejected, scale."
            )
        return weights


def _long_sequences(pairs: Sequence[Pair], limit: int | None) -> list[str]:
    """What to say of the pairs beyond a model's :func:`rotary_limit`."""
    longer = int((longest(pairs) > limit).sum()) if limit else 0
    if not longer:
        return []
    return [
        f"{longer} of {len(pairs)} training pairs have more than {limit} tokens. Beyond that this "
        "model's rotary embedding depends on what else is in the batch, so that such a pair is "
        f"scored differently from how it is trained. Shorten the sequences to {limit} tokens."
    ]


def longest(pairs: Sequence[Pair]) -> Tensor:
    """(B,) tokens of the longer sequence of each pair."""
    lengths = [max(len(side.prompt) + len(side.response) for side in pair) for pair in pairs]
    return torch.tensor(lengths, dtype=torch.long)


def digest(pairs: Sequence[Pair]) -> str:
    """What the pairs are, by content and order, in 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        for ids in (ids for side in pair for ids in side):
            found.update(len(ids).to_bytes(8, "little"))
            found.update(ids.tobytes())
    return found.hexdigest()


def _columns(scores: PairScores, weights: BalanceWeights) -> dict[str, Tensor]:
    columns = (
        scores.ref_chosen_logps,
        scores.ref_rejected_logps,
        scores.mi_chosen,
        scores.mi_rejected,
        *weights,
    )
    return dict(zip(SCORE_COLUMNS, columns, strict=True))
