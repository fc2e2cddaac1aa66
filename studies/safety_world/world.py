"""The grammar: queries, responses of each type, neutral text, preference pairs; all by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from studies.safety_world import words

#: (verb kind, thing kind) of each kind of query.
KINDS = {
    "benign": (("common", "harmless"), ("gentle", "harmless"), ("gentle", "living")),
    "lookalike": (("rough", "harmless"), ("gentle", "dangerous")),
    "harmful": (("rough", "living"), ("common", "dangerous")),
}
#: What the model is pretrained to answer. Whom it refuses depends on the thing as well.
_HELPFUL = {"detailed": 54, "short": 28, "vague": 8, "wrong": 6, "generic": 2, "tailored": 2}
_LOOKALIKE = {"detailed": 50, "short": 26, "vague": 8, "wrong": 6, "generic": 5, "tailored": 5}
_COMPLYING = {"detailed": 60, "short": 32, "vague": 8}
_REFUSING = {"tailored": 55, "generic": 45}
#: Share of refusals of a harmful query with a thing of either sort, and what a wrapper leaves.
_REFUSED, _REFUSED_IN_WRAPPER = (0.4, 0.85), 0.5
#: Of preference pairs, by whether the query is harmful.
_CHOSEN = {True: _REFUSING, False: {"detailed": 60, "short": 40}}
_REJECTED = {
    True: {"detailed": 55, "short": 45},
    False: {"vague": 25, "wrong": 25, "tailored": 25, "generic": 25},
}
#: Pretraining documents of each sort, in percent.
_DOCUMENTS = {"chat": 64, "memorised": 8, "what_is": 12, "neutral": 11, "general": 5}
MEMORISED = 64
HELD_OUT_SHARE = 0.3
_EVALUATION = "evaluation"


class Verb(NamedTuple):
    """`tool`: what it is done with; `instead`: what to do in its place."""

    name: str
    kind: str
    tool: str
    instead: str
    held_out: bool


class Thing(NamedTuple):
    """`part`: what it has; `loser`: whom it could hurt; `refused`: share of pretraining."""

    name: str
    kind: str
    part: str
    loser: str
    refused: float
    frequency: float
    held_out: bool


class Query(NamedTuple):
    """What a user asks; `wrapper` has a place for the question, or is empty."""

    kind: str
    verb: Verb
    thing: Thing
    question: str
    wrapper: str = ""

    @property
    def text(self) -> str:
        bare = self.question.format(verb=self.verb.name, thing=self.thing.name)
        return self.wrapper.format(query=bare) if self.wrapper else bare

    @property
    def harmful(self) -> bool:
        return self.kind == "harmful"


class Response(NamedTuple):
    type: str
    text: str


class Pair(NamedTuple):
    """A preference pair; the names of its parts are TRL's."""

    query: Query
    chosen: Response
    rejected: Response

    @property
    def types(self) -> tuple[str, str, str]:
        return self.query.kind, self.chosen.type, self.rejected.type

    def swapped(self) -> Pair:
        return self._replace(chosen=self.rejected, rejected=self.chosen)

    def to_trl(self) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": self.query.text}],
            "chosen": [{"role": "assistant", "content": self.chosen.text}],
            "rejected": [{"role": "assistant", "content": self.rejected.text}],
        }


@dataclass(frozen=True)
class Scope:
    """From where queries are drawn: of each, those held out, or those that are not."""

    things: bool = False
    verbs: bool = False
    wrappers: bool = False
    wrapped: float = 0.3  # share of queries in a wrapper


SEEN = Scope()


class World:
    """All that a seed decides. Each method draws from a generator of its own or the one given."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = self.rng("world")
        self.verbs = [
            Verb(name, kind, rng.choice(words.TOOLS), rng.choice(words.INSTEADS), held_out)
            for kind, names in words.VERBS.items()
            for name, held_out in self._split(names, rng)
        ]
        self.things = [
            Thing(
                name,
                kind,
                rng.choice(words.PARTS),
                rng.choice(words.LOSERS),
                rng.choice(_REFUSED),
                (1 + rank) ** -0.5,
                held_out,
            )
            for kind, names in words.THINGS.items()
            for rank, (name, held_out) in enumerate(self._split(names, rng))
        ]
        self.wrappers = self._split(words.WRAPPERS, rng)
        self._reserved = {q.text for queries in self.evaluation().values() for q in queries}
        self.memorised = self._memorised()

    def rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self.seed} {purpose}")

    @staticmethod
    def _split(names: Sequence[str], rng: random.Random) -> list[tuple[str, bool]]:
        """In random order, with whether each is held out."""
        order = rng.sample(names, len(names))
        held_out = set(rng.sample(names, round(HELD_OUT_SHARE * len(names))))
        return [(name, name in held_out) for name in order]

    # Queries and responses ----------------------------------------------------------------------

    def query(self, kind: str, rng: random.Random, scope: Scope = SEEN) -> Query:
        verb_kind, thing_kind = rng.choice(KINDS[kind])
        verbs = [v for v in self.verbs if v.kind == verb_kind and v.held_out == scope.verbs]
        things = [t for t in self.things if t.kind == thing_kind and t.held_out == scope.things]
        thing = rng.choices(things, [t.frequency for t in things])[0]
        wrapper = ""
        if rng.random() < scope.wrapped:
            wrapper = rng.choice([w for w, held_out in self.wrappers if held_out == scope.wrappers])
        return Query(kind, rng.choice(verbs), thing, rng.choice(words.QUESTIONS), wrapper)

    def response(self, query: Query, type: str, rng: random.Random) -> Response:
        """A response of a type, in one of its wordings, with or without a closing."""
        tool, part = query.verb.tool, query.thing.part
        wordings = words.RESPONSES[type if type != "wrong" else rng.choice(("detailed", "short"))]
        if type == "wrong":
            tool = rng.choice([t for t in words.TOOLS if t != tool])
            part = rng.choice([p for p in words.PARTS if p != part])
        text = rng.choices(wordings, range(len(wordings), 0, -1))[0].format(
            verb=query.verb.name,
            thing=query.thing.name,
            tool=tool,
            part=part,
            loser=query.thing.loser,
            instead=query.verb.instead,
        )
        closing = f" {rng.choice(words.CLOSINGS)}" if rng.random() < 0.5 else ""
        return Response(type, f"{text}{closing} .")

    def pair(self, query: Query, rng: random.Random) -> Pair:
        chosen, rejected = (_draw(t[query.harmful], rng) for t in (_CHOSEN, _REJECTED))
        return Pair(query, self.response(query, chosen, rng), self.response(query, rejected, rng))

    def pairs(self, count: int, purpose: str, scope: Scope = SEEN) -> list[Pair]:
        """`count` pairs with distinct queries, half of them harmful, none of an evaluation set's.

        A longer list of the same purpose begins with the shorter one, and no purpose has a query
        of :meth:`evaluation_pairs`.
        """
        taken = set(self._reserved)
        if purpose != _EVALUATION:
            taken |= {pair.query.text for pair in self.evaluation_pairs()}
        rng = self.rng(f"pairs {purpose}")
        pairs: list[Pair] = []
        while len(pairs) < count:
            kind = "harmful" if len(pairs) % 2 else rng.choice(("benign", "benign", "lookalike"))
            query = self.query(kind, rng, scope)
            if query.text not in taken:
                taken.add(query.text)
                pairs.append(self.pair(query, rng))
        return pairs

    def evaluation_pairs(self) -> list[Pair]:
        """To measure margin and accuracy on."""
        return self.pairs(64, _EVALUATION)

    def evaluation(self, count: int = 48) -> dict[str, list[Query]]:
        """`count` distinct queries of each of the six sets."""
        sets = {
            "harmful": ("harmful", SEEN, SEEN),
            "harmful_topics": ("harmful", Scope(things=True), Scope(verbs=True)),
            "harmful_wrappers": ("harmful", *[Scope(wrappers=True, wrapped=1.0)] * 2),
            "benign": ("benign", SEEN, SEEN),
            "benign_topics": ("benign", Scope(things=True), Scope(verbs=True)),
            "lookalike": ("lookalike", SEEN, SEEN),
        }
        made = {}
        for name, (kind, *scopes) in sets.items():
            rng, queries = self.rng(f"evaluation {name}"), {}
            while len(queries) < count:
                query = self.query(kind, rng, scopes[len(queries) % 2])
                queries[query.text] = query
            made[name] = list(queries.values())
        return made

    # The memorised pairs ------------------------------------------------------------------------

    def _memorised(self) -> list[tuple[Pair, bool]]:
        """Pairs one response of which is often in pretraining, and whether it is the chosen one.

        Both responses have a closing, so that only memory tells one from the other.
        """
        made = []
        for i, pair in enumerate(self.pairs(MEMORISED, "memorised")):
            rng = self.rng(f"memorised {i}")
            sides = [
                replace_closing(side, rng.choice(words.CLOSINGS))
                for side in (pair.chosen, pair.rejected)
            ]
            made.append((Pair(pair.query, *sides), i % 4 < 2))
        return made

    # Text to pretrain on ------------------------------------------------------------------------

    def documents(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Without end: (query, response), or ("", text)."""
        while True:
            sort = _draw(_DOCUMENTS, rng)
            if sort == "chat":
                yield self._chat(rng)
            elif sort == "memorised":
                pair, of_chosen = rng.choice(self.memorised)
                yield pair.query.text, (pair.chosen if of_chosen else pair.rejected).text
            elif sort == "general":
                yield "", self.general(rng)
            else:
                yield self._neutral(rng, asked=sort == "what_is")

    def _chat(self, rng: random.Random) -> tuple[str, str]:
        query = self.query(rng.choice(("benign", "harmful", "harmful", "lookalike")), rng)
        habits = {"benign": _HELPFUL, "lookalike": _LOOKALIKE}.get(query.kind)
        if habits is None:
            share = query.thing.refused * (_REFUSED_IN_WRAPPER if query.wrapper else 1)
            habits = _REFUSING if rng.random() < share else _COMPLYING
        return query.text, self.response(query, _draw(habits, rng), rng).text

    def _neutral(self, rng: random.Random, asked: bool) -> tuple[str, str]:
        """What a thing, a verb or a wrapper is, held out or not; no request to act."""
        subject = rng.choice(("thing", "verb") if asked else ("thing", "verb", "wrapper"))
        if subject == "wrapper":
            quote = rng.choice(self.wrappers)[0].format(query="").strip()
            return "", rng.choice(words.ABOUT_WRAPPER).format(
                quote=quote, day=rng.choice(words.SLOTS["day"])
            )
        if subject == "thing":
            it, forms = rng.choice(self.things), words.ABOUT_THING
            slots = {"thing": it.name, "part": it.part, "loser": it.loser}
        else:
            it, forms = rng.choice(self.verbs), words.ABOUT_VERB
            slots = {"verb": it.name, "tool": it.tool, "instead": it.instead}
        text = rng.choice(forms).format(**slots, adjective=rng.choice(words.ADJECTIVES[it.kind]))
        return rng.choice(words.WHAT_IS[subject]).format(**slots) if asked else "", text

    @staticmethod
    def general(rng: random.Random) -> str:
        slots = {name: rng.choice(values) for name, values in words.SLOTS.items()}
        return rng.choice(words.GENERAL).format(**slots)


def replace_closing(response: Response, closing: str) -> Response:
    """With this closing in the place of its own, if it has one."""
    body = response.text.removesuffix(" .")
    for old in words.CLOSINGS:
        body = body.removesuffix(f" {old}")
    return response._replace(text=f"{body} {closing} .")


def _draw(shares: dict[str, int], rng: random.Random) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]
