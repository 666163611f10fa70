"""The gate: whole verdicts on evidence whose every count is chosen."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.gate import shuffled
from training.gate import FAILED, OUTCOMES, Check, Cost, Evidence, Guard, Policy, Verdict, judge, promotes, summary

CLASSES = ("ant", "bee", "cat", "dog", "eel")
LABELS = np.arange(310) % 5
NONE = np.zeros(310, bool)


def first(count: int, start: int = 0, labels: NDArray[np.int64] = LABELS) -> NDArray[np.bool_]:
    """These pictures, in order: all classes alike."""
    index = np.arange(len(labels))
    return (index >= start) & (index < start + count)


def answers(wrong: NDArray[np.bool_], labels: NDArray[np.int64] = LABELS, sure: float = 0.85) -> NDArray[np.float64]:
    """Probabilities that are right but for some pictures, where they name the next class."""
    told = (labels + wrong) % 5
    probabilities = np.full((len(labels), 5), (1 - sure) / 4)
    probabilities[np.arange(len(labels)), told] = sure
    return probabilities


def changed(fixed: int, broken: int, both_wrong: int = 40, **more: object) -> Evidence:
    """310 pictures of the active version's classes, of which so many changed."""
    active = first(fixed + both_wrong)
    candidate = first(both_wrong, fixed) | first(broken, 310 - broken)
    return Evidence(CLASSES, LABELS, answers(candidate), answers(active), **more)  # type: ignore[arg-type]


def unknown(right: list[int], n: int = 20, nearest: list[int] | None = None) -> Evidence:
    """So many pictures of each of five new classes, of which so many are right."""
    labels = np.arange(5).repeat(n)

    def wrong(hits: list[int]) -> NDArray[np.bool_]:
        return np.concatenate([np.arange(n) >= count for count in hits])

    mean = answers(wrong(right if nearest is None else nearest), labels).argmax(1)
    return Evidence(CLASSES, labels, answers(wrong(right), labels), nearest_mean=mean, new_classes=CLASSES)


def check(verdict: Verdict, name: str) -> Check:
    return next(check for check in verdict.checks if check.name == name)


def states(verdict: Verdict) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verdict.checks}


# --- same classes ---


def test_a_better_candidate_is_promoted_with_every_figure_behind_it() -> None:
    verdict = judge(changed(41, 6))
    assert verdict.reason == "fixed 41 of 310, broke 6; p = 9e-8; promoted"
    assert (verdict.decision, verdict.finding) == ("promote", "fixed 41 of 310, broke 6; p = 9e-8")
    assert {name: score.model_dump() for name, score in verdict.comparisons.items()} == {
        "candidate": score(264, 0.8516, 0.8077, 0.8869),
        "active": score(229, 0.7387, 0.6871, 0.7845),
        "majority": score(62, 0.2, 0.1593, 0.2481),
    }
    assert [(check.name, check.passed, check.sentence) for check in verdict.checks] == [
        ("outputs", True, "Its outputs are finite and differ from picture to picture."),
        (
            "beats_guessing",
            True,
            "Its mean recall is 85.2 %, that of guessing 20 %; with labels shuffled at random one does as well with "
            "p = 2e-4 (below 0.001 is asked).",
        ),
        (
            "mcnemar",
            True,
            "Of 310 pictures it has 41 right that the active version has wrong, and 6 wrong that the other has right: "
            "p = 9e-8 (below 0.05 is asked).",
        ),
        (
            "macro_f1",
            True,
            "Macro-F1 changes by 11 points, with 95 % confidence by at least 7.8 points "
            "(more than -0.5 points is asked).",
        ),
        ("recall", True, "No class's recall fell by more than noise explains."),
        (
            "calibration",
            True,
            "Its calibration error is 0.2 % and the active version's 11.1 %; less what so few pictures add, a change "
            "of -9.5 points, with 95 % confidence of at least -14 points (up to 1 point passes).",
        ),
        ("guard", None, "There is no test set of the base to guard."),
        ("latency", None, "There is no version to compare latency with."),
        ("size", None, "There is no version to compare size with."),
    ]
    assert check(verdict, "mcnemar").figures == {
        "n": 310,
        "fixed": 41,
        "broken": 6,
        "p": pytest.approx(8.858e-8, rel=1e-3),
        "alpha": 0.05,
    }


def score(right: int, accuracy: float, low: float, high: float) -> dict[str, object]:
    expected = {"accuracy": accuracy, "low": low, "high": high, "macro_recall": accuracy}
    return {"right": right, "n": 310} | {name: pytest.approx(value, abs=5e-5) for name, value in expected.items()}


def test_the_same_evidence_gets_the_same_verdict() -> None:
    assert judge(changed(20, 9)) == judge(changed(20, 9))


@pytest.mark.parametrize(
    ("fixed", "broken"), [(5, 0), (7, 1), (9, 2), (10, 3), (12, 4), (13, 5), (19, 9), (30, 17), (40, 25)]
)
def test_the_smallest_numbers_that_pass(fixed: int, broken: int) -> None:
    assert judge(changed(fixed, broken)).decision == "promote"
    assert judge(changed(fixed - 1, broken)).decision == "keep"


@pytest.mark.parametrize(
    ("fixed", "broken", "more", "reason"),
    [
        (14, 10, {}, "fixed 14 of 310, broke 10; p = 0.27; kept the active version"),
        (4, 0, {}, "fixed 4 of 310, broke 0; not enough evidence; kept the active version"),
        (0, 0, {}, "fixed 0 of 310, broke 0; not enough evidence; kept the active version"),
        (5, 0, {"looks": 2}, "fixed 5 of 310, broke 0; not enough evidence; kept the active version"),
        (6, 0, {"looks": 2}, "fixed 6 of 310, broke 0; p = 0.016; promoted"),
        (6, 0, {"cross_validated": True}, "fixed 6 of 310, broke 0; not enough evidence; kept the active version"),
        (7, 0, {"cross_validated": True}, "fixed 7 of 310, broke 0; p = 0.0078; promoted"),
        (10, 3, {"cross_validated": True}, "fixed 10 of 310, broke 3; p = 0.046; kept the active version"),
    ],
)
def test_what_chance_explains_keeps_the_active_version(
    fixed: int, broken: int, more: dict[str, object], reason: str
) -> None:
    assert judge(changed(fixed, broken, **more)).reason == reason


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 60), st.integers(0, 40), st.booleans())
def test_to_fix_one_more_or_break_one_less_never_turns_a_pass_into_a_fail(fixed: int, broken: int, folds: bool) -> None:
    passed = [
        check(judge(changed(more, less, cross_validated=folds)), "mcnemar").passed is True
        for more, less in ((fixed, broken), (fixed + 1, broken), (fixed + 1, max(0, broken - 1)))
    ]
    assert passed == sorted(passed)


def test_a_class_that_is_lost_refuses_what_is_better_in_all() -> None:
    active, candidate = (LABELS < 4) & first(100), (LABELS == 4) & first(100, 210)
    verdict = judge(Evidence(CLASSES, LABELS, answers(candidate), answers(active)))
    assert (verdict.decision, verdict.reason) == (
        "refuse",
        "fixed 80 of 310, broke 20; p = 6e-10; refused: Recall fell: `eel` by 32 points "
        "(of 62, 0 fixed and 20 broken).",
    )
    assert check(verdict, "recall").figures == {"classes_fallen": 1, "largest_fall": 20 / 62}


def test_the_fall_of_a_class_that_noise_explains_is_no_objection() -> None:
    """4 of 62 broken is over 5 points, and its interval holds 0."""
    active, candidate = (LABELS < 4) & first(100), (LABELS == 4) & first(20, 290)
    verdict = judge(Evidence(CLASSES, LABELS, answers(candidate), answers(active)))
    assert verdict.decision == "promote"
    assert check(verdict, "recall").figures == {"classes_fallen": 0, "largest_fall": 4 / 62}


def test_a_candidate_that_is_far_too_sure_is_refused() -> None:
    evidence = Evidence(CLASSES, LABELS, answers(first(40), sure=0.999), answers(first(80), sure=0.75))
    verdict = judge(evidence)
    assert (verdict.decision, verdict.reason) == (
        "refuse",
        "fixed 40 of 310, broke 0; p = 9e-13; refused: Its calibration error is 12.8 % and the active version's 0.8 %; "
        "less what so few pictures add, a change of 13 points, with 95 % confidence of at least 9.3 points "
        "(up to 1 point passes).",
    )


def test_macro_f1_objects_where_rare_classes_pay_for_the_common_one() -> None:
    labels = np.array([0] * 280 + [1] * 10 + [2] * 10 + [3] * 5 + [4] * 5)
    active = np.arange(310) < 60  # all of the common class
    candidate = (labels > 0) & (np.arange(310) % 5 < 2)
    verdict = judge(Evidence(CLASSES, labels, answers(candidate, labels, 0.95), answers(active, labels, 0.8)))
    assert (verdict.decision, verdict.reason) == (
        "keep",
        "fixed 60 of 310, broke 12; p = 4e-9; kept the active version: Macro-F1 changes by -14 points, with 95 % "
        "confidence by at least -27 points (more than -0.5 points is asked).",
    )


# --- guard, latency, size ---


def guard(n: int, fixed: int, broken: int) -> Guard:
    index = np.arange(n)
    return Guard(candidate=index >= broken, base=index < n - fixed)


@pytest.mark.parametrize(
    ("n", "fixed", "broken", "passed", "sentence"),
    [
        (
            10_000,
            20,
            31,
            True,
            "Of 10000 test pictures of the base it fixed 20 and broke 31: 0.11 points lost, with 95 % confidence at "
            "most 0.23 points (up to 0.5 points passes).",
        ),
        (
            10_000,
            20,
            61,
            False,
            "Of 10000 test pictures of the base it fixed 20 and broke 61: 0.41 points lost, with 95 % confidence at "
            "most 0.56 points (up to 0.5 points passes).",
        ),
        (
            100,
            0,
            0,
            None,
            "Of 100 test pictures of the base it fixed 0 and broke 0: 0 points lost, with 95 % confidence at most 2.3 "
            "points (up to 0.5 points passes). So few can't tell.",
        ),
    ],
)
def test_the_guard_wants_to_be_sure_that_little_is_lost(
    n: int, fixed: int, broken: int, passed: bool | None, sentence: str
) -> None:
    verdict = judge(changed(41, 6, guard=guard(n, fixed, broken)))
    found = check(verdict, "guard")
    assert (found.passed, found.sentence) == (passed, sentence)
    assert verdict.decision == ("refuse" if passed is False else "promote")
    assert verdict.reason == "fixed 41 of 310, broke 6; p = 9e-8; " + (
        f"refused: {sentence}" if passed is False else "promoted"
    )


def test_the_guards_margin_is_the_callers() -> None:
    evidence = changed(41, 6, guard=guard(10_000, 20, 61))
    assert [judge(evidence, guard_margin=margin).decision for margin in (0.003, 0.006)] == ["refuse", "promote"]


def cost(*milliseconds: float, size: int = 8_000_000) -> Cost:
    return Cost(milliseconds, size)


STEADY = (0.33,) * 9


@pytest.mark.parametrize(
    ("candidate", "active", "decision", "passed", "sentence"),
    [
        (
            cost(*[0.33] * 8, 9.0),
            cost(*STEADY),
            "promote",
            True,
            "A picture takes 0.33 ms, and 0.33 ms with the active version; in 1 of 9 rounds it took over 5 % longer.",
        ),
        (
            cost(*[0.4] * 9),
            cost(*STEADY),
            "needs_review",
            False,
            "A picture takes 0.4 ms, and 0.33 ms with the active version; in 9 of 9 rounds it took over 5 % longer.",
        ),
        (
            cost(*[0.1] * 9),
            cost(*STEADY),
            "promote",
            True,
            "A picture takes 0.1 ms, and 0.33 ms with the active version; in 0 of 9 rounds it took over 5 % longer.",
        ),
        (
            cost(0.4, 0.4),
            cost(0.3, 0.3),
            "promote",
            None,
            "A picture takes 0.4 ms, and 0.3 ms with the active version; in 2 of 2 rounds it took over 5 % longer.",
        ),
    ],
)
def test_latency_counts_where_it_is_steadily_longer(
    candidate: Cost, active: Cost, decision: str, passed: bool | None, sentence: str
) -> None:
    verdict = judge(changed(41, 6, candidate_cost=candidate, active_cost=active))
    found = check(verdict, "latency")
    assert (verdict.decision, found.passed, found.sentence) == (decision, passed, sentence)


@pytest.mark.parametrize(
    ("size", "decision"), [(4_000_000, "promote"), (8_400_000, "promote"), (8_400_001, "needs_review")]
)
def test_a_size_that_grew_by_more_than_the_tolerance_needs_a_person(size: int, decision: str) -> None:
    evidence = changed(41, 6, candidate_cost=cost(*STEADY, size=size), active_cost=cost(*STEADY))
    assert judge(evidence).decision == decision
    assert judge(evidence, cost_tolerance=0.1).decision == "promote"


# --- candidates that are no classifiers ---


@pytest.mark.parametrize(
    ("candidate", "sentence"),
    [
        (np.full((310, 5), np.nan), "its probabilities aren't finite numbers."),
        (np.full((310, 5), 0.2), "it answers `ant` whatever the picture."),
    ],
)
@pytest.mark.parametrize("active", [None, answers(first(60))])
def test_outputs_that_mean_nothing_are_refused_whatever_the_policy(
    candidate: NDArray[np.float64], sentence: str, active: NDArray[np.float64] | None
) -> None:
    verdict = judge(Evidence(CLASSES, LABELS, candidate, active, new_classes=CLASSES))
    assert (verdict.decision, verdict.reason, len(verdict.checks)) == ("refuse", f"refused: {sentence}", 1)
    assert not promotes("always", verdict)
    assert summary("always", verdict) == verdict.reason


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("n", [20, 50, 300])
@pytest.mark.parametrize("equal", [True, False])
def test_shuffled_labels_are_refused_every_time(n: int, classes: int, equal: bool) -> None:
    job = shuffled(n, classes, equal=equal)
    assert {job(seed).decision for seed in range(50)} == {"refuse"}


@pytest.mark.parametrize("n", [20, 300])
def test_shuffled_labels_beside_an_active_version_are_refused_every_time(n: int) -> None:
    job = shuffled(n, 5, beside_active=True)
    assert {job(seed).decision for seed in range(8)} == {"refuse"}


# --- new classes ---


def test_a_good_model_of_new_classes_is_promoted() -> None:
    verdict = judge(unknown([18, 17, 19, 16, 20], nearest=[17, 17, 19, 12, 18]))
    assert verdict.reason == (
        "90 of 100 right, 90 % (95 % interval 82.6 % to 94.5 %); nearest class mean 83 %, "
        "always the commonest class 20 %; promoted"
    )
    assert states(verdict) == {
        "outputs": True,
        "beats_guessing": True,
        "beats_nearest_mean": True,
        "recall_of_new_classes": True,
        "guard": None,
        "latency": None,
        "size": None,
    }
    assert check(verdict, "recall_of_new_classes").sentence == "Of every new class at least 80 % is right."
    assert list(verdict.comparisons) == ["candidate", "nearest_mean", "majority"]


def test_where_nothing_can_be_better_as_good_is_enough() -> None:
    assert judge(unknown([20] * 5, nearest=[20] * 5)).decision == "promote"


def test_one_that_the_nearest_class_mean_beats_needs_review() -> None:
    verdict = judge(unknown([14] * 5, nearest=[16] * 5))
    assert (verdict.decision, verdict.reason) == (
        "needs_review",
        "70 of 100 right, 70 % (95 % interval 60.4 % to 78.1 %); nearest class mean 80 %, always the commonest class "
        "20 %; needs review: It has 0 right that the nearest class mean has wrong, and 10 wrong that the other has "
        "right: that it is the worse of the two has p = 1e-3 (not below 0.1 is asked).",
    )


@pytest.mark.parametrize(
    ("right", "n", "decision", "sentence"),
    [
        (
            [18, 18, 9, 18, 18],
            20,
            "needs_review",
            "Less than half is right: `cat` 9 of 20 (25.8 % to 65.8 % with 95 % confidence).",
        ),
        ([18, 18, 10, 18, 18], 20, "promote", "Of every new class at least 50 % is right."),
        (
            [5, 5, 2, 5, 5],
            5,
            "promote",
            "Too few pictures to tell: `cat` 2 of 5 (11.8 % to 76.9 % with 95 % confidence).",
        ),
        (
            [5, 5, 1, 5, 5],
            5,
            "needs_review",
            "Less than half is right: `cat` 1 of 5 (3.6 % to 62.4 % with 95 % confidence).",
        ),
    ],
)
def test_every_new_class_is_known_by_half_as_far_as_its_pictures_tell(
    right: list[int], n: int, decision: str, sentence: str
) -> None:
    verdict = judge(unknown(right, n))
    assert (verdict.decision, check(verdict, "recall_of_new_classes").sentence) == (decision, sentence)


def test_a_new_class_without_a_picture_in_the_hold_out_is_named() -> None:
    evidence = unknown([18] * 5)
    known = Evidence(
        (*CLASSES, "fox"),
        evidence.labels,
        np.pad(evidence.candidate, ((0, 0), (0, 1))),
        nearest_mean=evidence.nearest_mean,
        new_classes=("fox",),
    )
    verdict = judge(known)
    assert verdict.decision == "promote"
    assert check(verdict, "recall_of_new_classes").sentence == (
        "Too few pictures to tell: `fox` has no picture in the hold-out."
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=5, max_size=5), st.integers(0, 4))
def test_one_more_right_never_turns_a_pass_into_a_fail(right: list[int], index: int) -> None:
    more = [min(20, hits + (place == index)) for place, hits in enumerate(right)]
    before, after = states(judge(unknown(right, nearest=[15] * 5))), states(judge(unknown(more, nearest=[15] * 5)))
    for name in ("beats_nearest_mean", "recall_of_new_classes"):
        assert after.get(name, True) is not False or before.get(name, False) is not True


# --- policies ---

PASSED = judge(changed(41, 6))
KEPT = judge(changed(14, 10))
REVIEWED = judge(unknown([14] * 5, nearest=[16] * 5))


@pytest.mark.parametrize(
    ("policy", "promoted"),
    [("if_better", [True, False, False]), ("always", [True, True, True]), ("never", [False, False, False])],
)
def test_the_policy_decides_what_a_verdict_is_good_for(policy: Policy, promoted: list[bool]) -> None:
    assert [promotes(policy, verdict) for verdict in (PASSED, KEPT, REVIEWED)] == promoted


def test_the_summary_says_what_came_of_it() -> None:
    assert summary("if_better", PASSED) == PASSED.reason
    assert summary("if_better", KEPT) == KEPT.reason
    assert summary("never", PASSED) == "fixed 41 of 310, broke 6; p = 9e-8; passed, and not promoted, as the job asks"
    assert summary("always", KEPT) == f"{KEPT.reason}; promoted all the same, as the job asks"


# --- the page ---


def test_the_page_names_every_check_and_outcome() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gate.md").read_text()
    assert set(FAILED) <= set(re.findall(r"`(\w+)`", page))
    assert [outcome for outcome in OUTCOMES.values() if outcome not in page] == []


def test_the_pages_examples_are_verdicts() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gate.md").read_text()
    examples = [
        PASSED,
        KEPT,
        judge(changed(4, 0)),
        judge(unknown([18, 17, 19, 16, 20], nearest=[17, 17, 19, 12, 18])),
        REVIEWED,
    ]
    assert [
        verdict.reason for verdict in examples if verdict.reason not in " ".join(page.replace("\n> ", " ").split())
    ] == []
