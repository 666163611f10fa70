"""Logits to answers: calibrated probabilities, ranks, and whether the input looks like what the model knows.

The service and the command line both answer through here. Knows only arrays and the manifest.
"""

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from training.bundle.manifest import Manifest, Score

Logits = NDArray[np.float32]
Probabilities = NDArray[np.float64]


class Ranked(TypedDict):  # no object: there are five or more for each picture, and they are to become JSON
    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Answer:
    """What a model says of one picture: the best label, the `top_k` best with it, and whether to believe it."""

    scores: list[Ranked]  # best first
    in_distribution: bool

    @property
    def best(self) -> Ranked:
        return self.scores[0]


def probabilities(logits: Logits, temperature: float) -> Probabilities:
    """Softmax of logits / temperature, [N, K], in double precision so that rows sum to 1."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    exponentials = np.exp(scaled)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def familiarity(logits: Logits, score: Score, temperature: float) -> NDArray[np.float64]:
    """How much each input looks like the training data, [N]; higher is more familiar.

    `energy` is the log-sum-exp of the logits (Liu et al., 2020), `max_logit` and `max_probability` are what they say.
    """
    if score == "max_probability":
        return probabilities(logits, temperature).max(axis=1)
    top = logits.max(axis=1).astype(np.float64)
    if score == "max_logit":
        return top
    return top + np.log(np.exp(logits.astype(np.float64) - top[:, None]).sum(axis=1))


@dataclass(frozen=True)
class Ranking:
    """What a batch of logits says, all classes of it: `answer` cuts it to those that were asked for."""

    classes: tuple[str, ...]
    logits: Logits  # [N, K]
    order: NDArray[np.int64]  # [N, K], best first
    chances: Probabilities  # [N, K]
    familiar: NDArray[np.bool_]  # [N]

    def only(self, row: int) -> "Ranking":
        """A ranking of one row, which keeps nothing of the others alive."""
        one = slice(row, row + 1)
        return Ranking(
            self.classes,
            self.logits[one].copy(),
            self.order[one].copy(),
            self.chances[one].copy(),
            self.familiar[one].copy(),
        )

    def answer(self, row: int, top_k: int) -> Answer:
        best = self.order[row, :top_k]
        chances = self.chances[row].take(best)
        scores: list[Ranked] = [
            {"label": self.classes[index], "index": index, "probability": chance}
            for index, chance in zip(best.tolist(), chances.tolist(), strict=True)
        ]
        return Answer(scores, bool(self.familiar[row]))


Row = tuple[Ranking, int]  # what a batch's logits say, and which of its pictures is meant


def rank(logits: Logits, manifest: Manifest) -> Ranking:
    """Rank the classes of each row of logits [N, K]: for a whole batch at once, it costs little more than for one."""
    temperature, ood = manifest.calibration.temperature, manifest.ood
    return Ranking(
        classes=manifest.classes,
        logits=logits,
        order=np.argsort(-logits, axis=1, kind="stable"),
        chances=probabilities(logits, temperature),
        familiar=familiarity(logits, ood.score, temperature) >= ood.threshold,
    )


def answers(logits: Logits, manifest: Manifest, top_k: int) -> list[Answer]:
    """One answer for each row of logits [N, K]."""
    ranking = rank(logits, manifest)
    return [ranking.answer(row, top_k) for row in range(len(logits))]
