"""The gate: whether a fine-tuned candidate may answer. Predictions and figures in, a verdict in words out.

Pure: no files, no torch, and one verdict for the same evidence. docs/gate.md says what is asked, why, and how often the
gate errs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from training import significance
from training.significance import Flags, Labels, Shares

ALPHA = 0.05  # McNemar's: one worthless candidate in twenty gets past this check
ALPHA_CROSS_VALIDATED = 0.01  # folds share training pictures, which makes pooled answers look surer than they are
ALPHA_GUESSING = 0.001  # it must hold on the worst of data; who has learned anything passes by far
ALPHA_NEAREST_MEAN = 0.1  # only to see that training did no harm, so a weak sign is enough
ALPHA_LATENCY = 0.01
F1_SLACK = 0.005  # macro-F1 is noisier than accuracy, which McNemar has seen to
RECALL_FALL = 0.05
RECALL_OF_NEW = 0.5
RECALL_OF_GOOD = 0.75  # where so few pictures can't rule this out, a recall below one half is no objection
ECE_SLACK = 0.01

Decision = Literal["promote", "keep", "refuse", "needs_review"]
Policy = Literal["if_better", "always", "never"]

SEVEREST_FIRST: tuple[Decision, ...] = ("refuse", "keep", "needs_review", "promote")
FAILED: dict[str, Decision] = {  # what becomes of a candidate that fails the check
    "outputs": "refuse",
    "beats_guessing": "refuse",
    "mcnemar": "keep",
    "macro_f1": "keep",
    "recall": "refuse",
    "calibration": "refuse",
    "beats_nearest_mean": "needs_review",
    "recall_of_new_classes": "needs_review",
    "guard": "refuse",
    "latency": "needs_review",
    "size": "needs_review",
}
OUTCOMES: dict[Decision, str] = {
    "promote": "promoted",
    "keep": "kept the active version",
    "refuse": "refused",
    "needs_review": "needs review",
}


@dataclass(frozen=True)
class Guard:
    """Which pictures of the base's own test set [M] the candidate and the base have right."""

    candidate: Flags
    base: Flags


@dataclass(frozen=True)
class Cost:
    """What answering costs. The versions are timed in turns, so that a busy machine slows both of a round."""

    milliseconds: Sequence[float]  # of one picture, one figure a round
    bytes: int


@dataclass(frozen=True)
class Evidence:
    """Answers on one hold-out that nothing was fitted to; with cross-validation, those out of fold, pooled.

    `active` is what the version that answers now says of the same pictures; where there is none with these classes, the
    candidate is held against the nearest class mean. That is told in any case.
    """

    classes: Sequence[str]
    labels: Labels  # [N]
    candidate: Shares  # [N, K], calibrated probabilities
    active: Shares | None = None  # [N, K]
    nearest_mean: Labels | None = None  # [N], the class that it answers
    new_classes: Sequence[str] = ()  # those that the base doesn't know
    guard: Guard | None = None
    candidate_cost: Cost | None = None
    active_cost: Cost | None = None
    cross_validated: bool = False
    looks: int = 1  # candidates that were held against this hold-out, this one included

    @property
    def alpha(self) -> float:
        """What McNemar's p must be below: Bonferroni's share of it for each look."""
        return (ALPHA_CROSS_VALIDATED if self.cross_validated else ALPHA) / self.looks


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(_Record):
    """One question and its answer; `passed` is None where it doesn't arise or can't be told."""

    name: str
    passed: bool | None
    sentence: str
    figures: dict[str, float]


class Score(_Record):
    """What a classifier has right on the hold-out, with Wilson's 95 % interval of its accuracy."""

    right: int
    n: int
    accuracy: float
    low: float
    high: float
    macro_recall: float


class Verdict(_Record):
    """`reason` is `finding` with the outcome; `comparisons` has candidate, active, nearest_mean, majority."""

    decision: Decision
    finding: str
    reason: str
    checks: tuple[Check, ...]
    comparisons: dict[str, Score]


def judge(evidence: Evidence, *, guard_margin: float = 0.005, cost_tolerance: float = 0.05, seed: int = 0) -> Verdict:
    """Hold a candidate against what answers now, or against the simplest methods where nothing does."""
    outputs = _outputs(evidence)
    if not outputs.passed:
        return Verdict(
            decision="refuse",
            finding=outputs.sentence,
            reason=f"refused: {outputs.sentence}",
            checks=(outputs,),
            comparisons={},
        )
    checks = [outputs, _beats_guessing(evidence, seed)]
    if evidence.active is not None:
        paired = Paired(evidence.labels, evidence.candidate, evidence.active)
        mcnemar = _mcnemar(paired, evidence.alpha)
        checks += [
            mcnemar,
            _macro_f1(paired, bool(mcnemar.passed), seed),
            _recall(paired, evidence.classes),
            _calibration(paired, seed),
        ]
    else:
        checks += [_beats_nearest_mean(evidence), _recall_of_new_classes(evidence)]
    checks += [
        _guard(evidence.guard, guard_margin),
        _latency(evidence.candidate_cost, evidence.active_cost, cost_tolerance),
        _size(evidence.candidate_cost, evidence.active_cost, cost_tolerance),
    ]
    return _verdict(tuple(checks), _comparisons(evidence))


def promotes(policy: Policy, verdict: Verdict) -> bool:
    """Whether a candidate becomes the active version. Nobody can ask for one whose outputs mean nothing."""
    if policy == "never" or any(check.name == "outputs" and not check.passed for check in verdict.checks):
        return False
    return policy == "always" or verdict.decision == "promote"


def summary(policy: Policy, verdict: Verdict) -> str:
    """One sentence: what was found, and what came of it."""
    promoted, passed = promotes(policy, verdict), verdict.decision == "promote"
    if promoted and not passed:
        return f"{verdict.reason}; promoted all the same, as the job asks"
    if passed and not promoted:
        return f"{verdict.finding}; passed, and not promoted, as the job asks"
    return verdict.reason


def _verdict(checks: tuple[Check, ...], comparisons: dict[str, Score]) -> Verdict:
    # To be better than the active version takes evidence; of the other questions, one that can't be told doesn't count.
    failed = [check for check in checks if check.passed is False or (check.passed is None and check.name == "mcnemar")]
    outcomes = {FAILED[check.name] for check in failed}
    decision: Decision = next((decision for decision in SEVEREST_FIRST if decision in outcomes), "promote")
    finding = _finding(checks, comparisons)
    objections = [check for check in failed if FAILED[check.name] == decision]
    told = "" if any(check.name == "mcnemar" for check in objections) else " ".join(c.sentence for c in objections)
    reason = f"{finding}; {OUTCOMES[decision]}" + (f": {told}" if told else "")
    return Verdict(decision=decision, finding=finding, reason=reason, checks=checks, comparisons=comparisons)


def _finding(checks: tuple[Check, ...], comparisons: dict[str, Score]) -> str:
    mcnemar = next((check for check in checks if check.name == "mcnemar"), None)
    if mcnemar:
        fixed, broken, n = (round(mcnemar.figures[name]) for name in ("fixed", "broken", "n"))
        p = "not enough evidence" if mcnemar.passed is None else f"p = {_p(mcnemar.figures['p'])}"
        return f"fixed {fixed} of {n}, broke {broken}; {p}"
    score, majority = comparisons["candidate"], comparisons["majority"]
    others = [f"always the commonest class {_percent(majority.accuracy)}"]
    if nearest := comparisons.get("nearest_mean"):
        others.insert(0, f"nearest class mean {_percent(nearest.accuracy)}")
    interval = f"95 % interval {_percent(score.low)} to {_percent(score.high)}"
    return f"{score.right} of {score.n} right, {_percent(score.accuracy)} ({interval}); {', '.join(others)}"


def _comparisons(evidence: Evidence) -> dict[str, Score]:
    labels = evidence.labels
    answers = {"candidate": evidence.candidate.argmax(1)}
    if evidence.active is not None:
        answers["active"] = evidence.active.argmax(1)
    if evidence.nearest_mean is not None:
        answers["nearest_mean"] = evidence.nearest_mean
    answers["majority"] = np.full_like(labels, np.bincount(labels).argmax())
    return {name: _score(labels, given) for name, given in answers.items()}


def _score(labels: Labels, answers: Labels) -> Score:
    right, n = int((labels == answers).sum()), len(labels)
    low, high = significance.wilson(right, n)
    recall = significance.macro_recall(labels, answers)
    return Score(right=right, n=n, accuracy=right / n, low=low, high=high, macro_recall=recall)


# --- checks of any candidate ---


def _outputs(evidence: Evidence) -> Check:
    """Finite, and not one answer for every picture."""
    finite = bool(np.isfinite(evidence.candidate).all())
    different = len(np.unique(evidence.candidate.argmax(1))) if finite else 0
    if not finite:
        sentence = "its probabilities aren't finite numbers."
    elif different == 1:
        sentence = f"it answers `{evidence.classes[evidence.candidate[0].argmax()]}` whatever the picture."
    else:
        sentence = "Its outputs are finite and differ from picture to picture."
    return Check(name="outputs", passed=different > 1, sentence=sentence, figures={"classes_answered": different})


def _beats_guessing(evidence: Evidence, seed: int) -> Check:
    answers = evidence.candidate.argmax(1)
    p = significance.guessing(evidence.labels, answers, np.random.default_rng(seed))
    recall, guess = significance.macro_recall(evidence.labels, answers), 1 / len(np.unique(evidence.labels))
    sentence = (
        f"Its mean recall is {_percent(recall)}, that of guessing {_percent(guess)}; "
        f"with labels shuffled at random one does as well with p = {_p(p)} (below {ALPHA_GUESSING} is asked)."
    )
    figures = {"macro_recall": recall, "guessing": guess, "p": p}
    return Check(name="beats_guessing", passed=p < ALPHA_GUESSING, sentence=sentence, figures=figures)


def _guard(guard: Guard | None, margin: float) -> Check:
    """Not inferior on what the base knows: the 95 % upper bound of the loss stays within the margin."""
    if guard is None:
        return _not_asked("guard", "There is no test set of the base to guard.")
    n = len(guard.base)
    fixed, broken = _changes(guard.candidate, guard.base)
    interval = significance.paired_difference(fixed, broken, n, confidence=0.9)
    at_least, at_most = -interval.high, -interval.low
    can_tell = at_least > margin or -significance.paired_difference(0, 0, n, confidence=0.9).low <= margin
    sentence = (
        f"Of {n} test pictures of the base it fixed {fixed} and broke {broken}: {_points((broken - fixed) / n)} lost, "
        f"with 95 % confidence at most {_points(at_most)} (up to {_points(margin)} passes)."
    )
    figures = {"n": n, "fixed": fixed, "broken": broken, "lost": (broken - fixed) / n, "lost_at_most": at_most}
    passed = at_most <= margin if can_tell else None
    if passed is None:
        sentence += " So few can't tell."
    return Check(name="guard", passed=passed, sentence=sentence, figures=figures | {"margin": margin})


def _latency(candidate: Cost | None, active: Cost | None, tolerance: float) -> Check:
    """Fails where most rounds are slower by more than the tolerance, by a sign test: one bad round is no sign."""
    if candidate is None or active is None:
        return _not_asked("latency", "There is no version to compare latency with.")
    pairs = list(zip(candidate.milliseconds, active.milliseconds, strict=True))
    slower = sum(mine > (1 + tolerance) * other for mine, other in pairs)
    mine, other = float(np.median(candidate.milliseconds)), float(np.median(active.milliseconds))
    p = significance.sign_test(slower, len(pairs))
    can_tell = significance.sign_test(len(pairs), len(pairs)) < ALPHA_LATENCY
    sentence = (
        f"A picture takes {mine:.3g} ms, and {other:.3g} ms with the active version; in {slower} of {len(pairs)} "
        f"rounds it took over {_percent(tolerance)} longer."
    )
    figures = {"milliseconds": mine, "active_milliseconds": other, "rounds": len(pairs), "slower": slower, "p": p}
    return Check(name="latency", passed=p >= ALPHA_LATENCY if can_tell else None, sentence=sentence, figures=figures)


def _size(candidate: Cost | None, active: Cost | None, tolerance: float) -> Check:
    if candidate is None or active is None:
        return _not_asked("size", "There is no version to compare size with.")
    sentence = (
        f"It takes {candidate.bytes / 1e6:.3g} MB and the active version {active.bytes / 1e6:.3g} MB "
        f"(up to {_percent(tolerance)} more passes)."
    )
    figures = {"bytes": candidate.bytes, "active_bytes": active.bytes}
    return Check(
        name="size", passed=candidate.bytes <= (1 + tolerance) * active.bytes, sentence=sentence, figures=figures
    )


# --- checks beside an active version with the same classes ---


class Paired:
    """Two classifiers' answers on the same pictures."""

    def __init__(self, labels: Labels, candidate: Shares, active: Shares) -> None:
        self.labels = labels
        self.candidate, self.active = candidate.argmax(1), active.argmax(1)
        self.candidate_right, self.active_right = self.candidate == labels, self.active == labels
        self.candidate_confidence, self.active_confidence = candidate.max(1), active.max(1)


def _mcnemar(paired: Paired, alpha: float) -> Check:
    n = len(paired.labels)
    fixed, broken = _changes(paired.candidate_right, paired.active_right)
    p = significance.mcnemar(fixed, broken)
    # Where even fixing all of them would prove nothing (fewer than 5 at 0.05), the answer isn't no.
    can_tell = significance.mcnemar(fixed + broken, 0) < alpha
    asked = f"(below {alpha:.2g} is asked)" if can_tell else "and so few pictures can't tell"
    sentence = (
        f"Of {n} pictures it has {fixed} right that the active version has wrong, and {broken} wrong that the other "
        f"has right: p = {_p(p)} {asked}."
    )
    figures = {"n": n, "fixed": fixed, "broken": broken, "p": p, "alpha": alpha}
    return Check(name="mcnemar", passed=p < alpha if can_tell else None, sentence=sentence, figures=figures)


def _macro_f1(paired: Paired, more_accurate: bool, seed: int) -> Check:
    random = np.random.default_rng(seed)
    gains = significance.macro_f1_gains(paired.labels, paired.candidate, paired.active, random)
    before, after = (significance.macro_f1(paired.labels, given) for given in (paired.active, paired.candidate))
    gain, low = after - before, float(np.quantile(gains, 0.05))
    least = -F1_SLACK if more_accurate else 0.0
    sentence = (
        f"Macro-F1 changes by {_points(gain)}, with 95 % confidence by at least {_points(low)} "
        f"(more than {_points(least)} is asked)."
    )
    return Check(name="macro_f1", passed=low > least, sentence=sentence, figures={"gain": gain, "gain_at_least": low})


def _recall(paired: Paired, classes: Sequence[str]) -> Check:
    """No class falls by more than 5 points, as far as its pictures can tell."""
    fell, worst = [], 0.0
    for index in np.unique(paired.labels):
        mine = paired.labels == index
        n = int(mine.sum())
        fixed, broken = _changes(paired.candidate_right[mine], paired.active_right[mine])
        fall = (broken - fixed) / n
        worst = max(worst, fall)
        if fall > RECALL_FALL and significance.paired_difference(fixed, broken, n).high < 0:
            fell.append(f"`{classes[index]}` by {_points(fall)} (of {n}, {fixed} fixed and {broken} broken)")
    sentence = f"Recall fell: {_listed(fell)}." if fell else "No class's recall fell by more than noise explains."
    figures = {"classes_fallen": len(fell), "largest_fall": worst}
    return Check(name="recall", passed=not fell, sentence=sentence, figures=figures)


def _calibration(paired: Paired, seed: int) -> Check:
    """Fails where ECE is shown to be more than a point worse.

    ECE is biased upwards on few pictures, and more for the less confident of two, so each is held against what perfect
    confidence would give; and a difference counts from where its noise ends.
    """
    candidate = (paired.candidate_confidence, paired.candidate_right)
    active = (paired.active_confidence, paired.active_right)
    eces, unbiased = [], []
    for confidence, right in (candidate, active):
        eces.append(significance.calibration_error(confidence, right))
        unbiased.append(max(0.0, eces[-1] - significance.calibration_bias(confidence, np.random.default_rng(seed))))
    worse = unbiased[0] - unbiased[1]
    noise = significance.calibration_noise(candidate, active, np.random.default_rng(seed))
    at_least = worse - 1.645 * noise
    sentence = (
        f"Its calibration error is {_percent(eces[0])} and the active version's {_percent(eces[1])}; less what so few "
        f"pictures add, a change of {_points(worse)}, with 95 % confidence of at least {_points(at_least)} "
        f"(up to {_points(ECE_SLACK)} passes)."
    )
    figures = {"ece": eces[0], "active_ece": eces[1], "worse": worse, "worse_at_least": at_least}
    return Check(name="calibration", passed=at_least <= ECE_SLACK, sentence=sentence, figures=figures)


# --- checks of a candidate with new classes ---


def _beats_nearest_mean(evidence: Evidence) -> Check:
    """No worse than the nearest class mean, which needs no training; where both are perfect it passes."""
    if evidence.nearest_mean is None:
        return _not_asked("beats_nearest_mean", "There is no nearest class mean to compare with.")
    mine, others = evidence.candidate.argmax(1) == evidence.labels, evidence.nearest_mean == evidence.labels
    fixed, broken = _changes(mine, others)
    p = significance.mcnemar(broken, fixed)
    sentence = (
        f"It has {fixed} right that the nearest class mean has wrong, and {broken} wrong that the other has right: "
        f"that it is the worse of the two has p = {_p(p)} (not below {ALPHA_NEAREST_MEAN} is asked)."
    )
    figures = {"fixed": fixed, "broken": broken, "p": p}
    return Check(name="beats_nearest_mean", passed=p >= ALPHA_NEAREST_MEAN, sentence=sentence, figures=figures)


def _recall_of_new_classes(evidence: Evidence) -> Check:
    """At least one half of each; a class with so few pictures that 0.75 stays possible isn't held against it."""
    right = evidence.candidate.argmax(1) == evidence.labels
    low: list[str] = []
    untold: list[str] = []
    least = 1.0
    for name in evidence.new_classes:
        mine = right[evidence.labels == evidence.classes.index(name)]
        hits, n = int(mine.sum()), len(mine)
        if n == 0:
            untold.append(f"`{name}` has no picture in the hold-out")
            continue
        least = min(least, hits / n)
        if hits / n >= RECALL_OF_NEW:
            continue
        bounds = significance.wilson(hits, n)
        said = f"`{name}` {hits} of {n} ({_percent(bounds.low)} to {_percent(bounds.high)} with 95 % confidence)"
        (untold if bounds.high >= RECALL_OF_GOOD else low).append(said)
    if low:
        sentence = f"Less than half is right: {_listed(low)}."
    elif untold:
        sentence = f"Too few pictures to tell: {_listed(untold)}."
    elif evidence.new_classes:
        sentence = f"Of every new class at least {_percent(least)} is right."
    else:
        return _not_asked("recall_of_new_classes", "There is no new class.")
    figures = {"least": least, "classes_below": len(low), "classes_untold": len(untold)}
    passed = False if low else None if untold else True
    return Check(name="recall_of_new_classes", passed=passed, sentence=sentence, figures=figures)


# --- words ---


def _changes(mine: NDArray[np.bool_], others: NDArray[np.bool_]) -> tuple[int, int]:
    """How many the first fixed, and how many it broke."""
    return int((mine & ~others).sum()), int((others & ~mine).sum())


def _not_asked(name: str, sentence: str) -> Check:
    return Check(name=name, passed=None, sentence=sentence, figures={})


def _p(p: float) -> str:
    """Two digits, and beyond a thousandth the magnitude: 0.038, 2e-7."""
    return f"{p:.2g}" if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-")


def _percent(share: float) -> str:
    return f"{round(100 * share, 1):g} %"


def _points(share: float) -> str:
    points = f"{100 * share:.2g}"
    return f"{points} point" + "s" * (points not in ("1", "-1"))


def _listed(items: list[str], most: int = 5) -> str:
    rest = [f"{len(items) - most} more"] if len(items) > most else []
    return ", ".join(items[:most] + rest)
