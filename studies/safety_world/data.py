"""The preference data of each condition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from bdpo_plugin.reference.score_pairs import PairScores
from studies.safety_world.world import Pair, World

#: Of the pool that balanced and imbalanced pairs are chosen from, for each pair wanted.
POOL = 4


def training_pairs(
    world: World, condition: str, count: int, score: Callable[[list[Pair]], PairScores]
) -> list[Pair]:
    """The pairs to train on.

    Args:
        condition: ``plain``; ``imbalanced NN``: NN % of the pairs have unequal MI, the others are
            their matches of nearly equal MI; ``noise NN``: NN % have chosen and rejected swapped;
            ``memorised``: one response of each is often in pretraining.
        score: the MI of pairs under the pretrained model.
    """
    name, _, percent = condition.partition(" ")
    memorised = [pair for pair, _ in world.memorised]
    if name == "memorised":
        return memorised[:count]
    known = {pair.query.text for pair in memorised}

    def fresh(number: int) -> list[Pair]:
        drawn = world.pairs(number + len(memorised), "training")
        return [pair for pair in drawn if pair.query.text not in known][:number]

    if name == "imbalanced":
        pool = fresh(POOL * count)
        matches = matched(pool, score(pool), count)
        # spread over the types, which the matches are sorted by
        share, taken = int(percent) / 100, range(len(matches))
        return [matches[i][0 if int((i + 1) * share) > int(i * share) else 1] for i in taken]
    pairs = fresh(count)
    if name == "noise":
        wrong = set(world.rng(condition).sample(range(count), round(count * int(percent) / 100)))
        return [pair.swapped() if i in wrong else pair for i, pair in enumerate(pairs)]
    if name != "plain":
        raise ValueError(f"unknown condition {condition!r}")
    return pairs


def matched(pool: list[Pair], scores: PairScores, count: int) -> list[tuple[Pair, Pair]]:
    """`count` couples of an imbalanced and a balanced pair of the pool.

    Of each group of pairs with the same query kind and response types, as many as its share of
    the pool: those whose MI differs most, each with the pair of the half that differs least
    whose two responses are nearest in length.
    """
    gap = (scores.mi_chosen - scores.mi_rejected).abs().tolist()
    lengths = list(zip(scores.chosen_tokens.tolist(), scores.rejected_tokens.tolist(), strict=True))
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, pair in enumerate(pool):
        groups[pair.types].append(i)
    couples: list[tuple[float, Pair, Pair]] = []
    for members in groups.values():
        members.sort(key=lambda i: -gap[i])
        balanced = members[(len(members) + 1) // 2 :]
        for i in members[: round(len(members) / POOL)]:
            if not balanced:
                break
            j = min(balanced, key=lambda j: sum(map(_distance, lengths[i], lengths[j])))
            balanced.remove(j)
            couples.append((gap[i] - gap[j], pool[i], pool[j]))
    # rounding may give a few too many: those that differ least go
    widest = sorted(couples, key=lambda couple: -couple[0])[:count]
    return [couple[1:] for couple in couples if couple in widest]


def _distance(a: int, b: int) -> int:
    return abs(a - b)
