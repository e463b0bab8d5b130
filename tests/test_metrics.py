"""Metrics against scikit-learn and scipy, votes against brute force, and degenerate input."""

import itertools
import json
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics

from nanolaser import metrics
from nanolaser.metrics import (
    answer_classes, auroc, auroc_within, best_of_at_k, bootstrap, brier, compare, coverage_curve,
    ece, fit_threshold, majority_vote, mean_and_stderr, pass_at_k, reliability, right_by_rank,
    risk_coverage, safely, spearman,
    statistics, summarise, tally, verification, verification_f1, vote_change_probability,
    vote_sizes, vote_tables, votes_at_k, weighted_vote)


def same(a, b):
    return a == b


def sample(seed, size=60, levels=None):
    """Random truth and scores beyond [0, 1]; `levels` makes ties."""
    rng = np.random.default_rng(seed)
    right = rng.random(size) < 0.4
    score = rng.normal(0.4 + 0.2 * right, 0.4)
    return right, score if levels is None else np.round(score * levels) / levels


# ---------------------------------------------------------------- self-verification


def test_verification_f1_by_hand():
    # Right ones: 2 of 3 above 0.5.  Wrong ones: 1 of 2 not above (0.5 itself is not above).
    result = verification_f1([1, 1, 1, 0, 0], [0.9, 0.6, 0.2, 0.5, 0.8])
    assert result.accuracy_correct == pytest.approx(2 / 3)
    assert result.accuracy_wrong == 0.5
    assert result.f1 == pytest.approx(2 / (3 / 2 + 2))


@pytest.mark.parametrize("seed", range(5))
def test_verification_f1_is_the_harmonic_mean_of_recalls(seed):
    right, score = sample(seed)
    verdict = score > 0.5
    recalls = [sklearn_metrics.recall_score(right, verdict, pos_label=label) for label in (1, 0)]
    result = verification_f1(right, score)
    assert (result.accuracy_correct, result.accuracy_wrong) == pytest.approx(recalls)
    assert result.f1 == pytest.approx(stats.hmean(recalls))


def test_verification_f1_degenerate():
    assert verification_f1([1, 1], [0.9, 0.1]) == (None, 0.5, None)
    assert verification_f1([0, 0], [0.9, 0.1]) == (None, None, 0.5)
    assert verification_f1([], []) == (None, None, None)
    assert verification_f1([1, 0], [0.0, 1.0]) == (0.0, 0.0, 0.0)       # no division by zero
    assert verification_f1([1, 0], [1.0, 1.0]).f1 == 0.0                # always "right"
    assert verification_f1([1, 0], [None, None]) == (0.0, 0.0, 1.0)     # missing: judged wrong


@pytest.mark.parametrize("levels", [None, 10, 2])
@pytest.mark.parametrize("seed", range(4))
def test_auroc_is_scikit_learns(seed, levels):
    right, score = sample(seed, levels=levels)
    assert auroc(right, score) == pytest.approx(sklearn_metrics.roc_auc_score(right, score))


def test_auroc_degenerate():
    assert auroc([1, 1], [0.1, 0.2]) is None
    assert auroc([0], [0.1]) is None
    assert auroc([], []) is None
    assert auroc([1, 0, 1, 0], [0.3] * 4) == 0.5
    assert auroc([1, 0], [0.6, 0.4]) == 1.0 and auroc([1, 0], [0.4, 0.6]) == 0.0
    with pytest.raises(ValueError, match="no score"):
        auroc([1, 0], [0.1, None])
    with pytest.raises(ValueError, match="length"):
        auroc([1, 0, 1], [0.1, 0.2])


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("seed", range(4))
def test_auroc_within_counts_pairs(seed, levels):
    right, score = sample(seed, 80, levels)
    problem = np.random.default_rng(seed).integers(12, size=80)
    pairs = [(i, j) for i in range(80) for j in range(80)
             if problem[i] == problem[j] and right[i] and not right[j]]
    expected = np.mean([1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0
                        for i, j in pairs])
    assert auroc_within(right, score, problem) == pytest.approx(expected)


def test_auroc_within_is_not_fooled_by_difficulty():
    """A score that only knows how easy the problem is: plain AUROC is high, this one chance."""
    right = [1, 1, 1, 0, 1, 0, 0, 0]
    score = [0.9] * 4 + [0.1] * 4
    problem = ["easy"] * 4 + ["hard"] * 4
    assert auroc(right, score) == 0.75
    assert auroc_within(right, score, problem) == 0.5
    assert auroc_within([1, 1, 0], [0.1, 0.2, 0.3], ["a", "a", "b"]) is None
    assert auroc_within([], [], []) is None


def test_ece_and_brier_by_hand():
    right, score = [1, 0, 1, 1], [0.95, 0.91, 0.25, 1.7]
    # Bin (0.9, 1]: accuracy 2/3, score (0.95 + 0.91 + 1) / 3.  Bin (0.2, 0.3]: 1 against 0.25.
    gap = abs(2 / 3 - (0.95 + 0.91 + 1) / 3)
    assert ece(right, score) == pytest.approx((3 * gap + 0.75) / 4)
    assert brier(right, score) == pytest.approx((0.05**2 + 0.91**2 + 0.75**2) / 4)


@pytest.mark.parametrize("bins", [1, 5, 10, 15])
@pytest.mark.parametrize("levels", [None, 10, 20])
def test_ece_agrees_with_scikit_learns_calibration_curve(bins, levels):
    from sklearn.calibration import calibration_curve

    right, score = sample(3, 200, levels)
    clipped = np.clip(score, 0, 1)
    accuracy, mean_score = calibration_curve(right, clipped, n_bins=bins, strategy="uniform")
    table = [row for row in reliability(right, score, bins) if row["count"]]
    assert [row["accuracy"] for row in table] == pytest.approx(accuracy)
    assert [row["score"] for row in table] == pytest.approx(mean_score)
    counts = np.array([row["count"] for row in table])
    assert counts.sum() == 200
    assert ece(right, score, bins) == pytest.approx(counts @ np.abs(accuracy - mean_score) / 200)
    assert brier(right, score) == pytest.approx(sklearn_metrics.brier_score_loss(right, clipped))


def test_calibration_degenerate():
    assert ece([], []) is None and brier([], []) is None
    assert ece([1, 1], [1.0, 1.5]) == 0.0 and ece([0], [-3.0]) == 0.0
    assert ece([1], [0.0]) == 1.0 and brier([1], [0.0]) == 1.0
    table = reliability([1, 0, 1], [0.0, 0.5, 1.0])
    assert [row["count"] for row in table] == [1, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert table[1]["accuracy"] is None
    assert len(reliability([], [])) == 10


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("seed", range(3))
def test_spearman_is_scipys(seed, levels):
    _, x = sample(seed, levels=levels)
    y = np.random.default_rng(seed + 9).integers(5, 30, size=len(x))
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert spearman(x, x) == pytest.approx(1.0) and spearman(x, -x) == pytest.approx(-1.0)


@pytest.mark.parametrize("levels", [None, 5])
def test_coverage_is_the_mean_over_the_orders_of_equals(levels):
    """Equal scores shuffled a thousand times, the accuracy of the first k counted each time."""
    right, score = sample(2, 40, levels)
    rng, total = np.random.default_rng(0), np.zeros(40)
    for _ in range(2000):
        mixed = rng.permutation(40)
        order = mixed[np.argsort(-score[mixed], kind="stable")]
        total += np.cumsum(right[order]) / np.arange(1, 41)
    curve = coverage_curve(right, score)
    assert curve == pytest.approx(total / 2000, abs=0.03)
    found = risk_coverage(right, score)
    assert found["aurc"] == pytest.approx(np.mean(1 - curve))
    assert [found[f"accuracy_at_{c}"] for c in (50, 80, 90)] == [curve[19], curve[31], curve[35]]
    assert curve[-1] == pytest.approx(right.mean())     # all of them: nothing is left to choose
    assert risk_coverage([1, 0], [0.3, 0.3])["aurc"] == 0.5
    assert set(risk_coverage([], []).values()) == {None}


@pytest.mark.parametrize("seed", range(4))
def test_the_fitted_threshold_is_the_best_there_is(seed):
    right, score = sample(seed, levels=[None, 10][seed % 2])
    score = [None if i % 9 == 0 else 0.4 * s for i, s in enumerate(score)]
    best = max(verification_f1(right, score, t).f1 for t in np.linspace(-1, 2, 3001))
    assert verification_f1(right, score, fit_threshold(right, score)).f1 == pytest.approx(best)
    assert best > verification_f1(right, score).f1 + 0.1


def test_a_threshold_needs_both_kinds():
    for right in ([], [1, 1], [0]):
        with pytest.raises(ValueError):
            fit_threshold(right, [0.5] * len(right))
    assert fit_threshold([1, 0], [None, None]) == 0.5
    assert fit_threshold([1, 0], [0.9, 0.1]) == 0.5


def test_vote_share():
    rows = [rollout(0, a) for a in ("4", "5", None, "4.0")] + [rollout(1, "4")]
    merged = metrics.vote_share(rows, lambda a, b: float(a) == float(b))
    assert merged == [0.5, 0.25, 0.0, 0.5, 1.0]


def test_spearman_degenerate():
    assert spearman([], []) is None and spearman([1.0], [2.0]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [5, 5]) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(-1e6, 1e6), st.integers(0, 3)), max_size=12))
def test_no_input_gives_nan_or_leaves_the_range(rows):
    right, score, problem = [list(column) for column in zip(*rows)] or [[], [], []]
    right, score, problem = ([], [], []) if not rows else (right, score, problem)
    for value in (*verification_f1(right, score), auroc(right, score), ece(right, score),
                  auroc_within(right, score, problem), brier(right, score)):
        assert value is None or 0 <= value <= 1
    rho = spearman(score, right)
    assert rho is None or -1 <= rho <= 1


# ---------------------------------------------------------------- standard errors


def test_stderr_without_clusters_is_scipys():
    values = np.random.default_rng(0).random(30)
    mean, error = mean_and_stderr(values)
    assert mean == pytest.approx(values.mean()) and error == pytest.approx(stats.sem(values))


def test_clustered_stderr_of_equal_clusters_is_that_of_their_means():
    values = np.random.default_rng(1).random((12, 5))
    problem = np.repeat(np.arange(12), 5)
    assert mean_and_stderr(values.ravel(), problem)[1] == pytest.approx(
        stats.sem(values.mean(axis=1)))
    # Copies of the same solution add nothing: 5 copies of each have the error of one each.
    copies = np.repeat(values[:, :1], 5, axis=1)
    assert mean_and_stderr(copies.ravel(), problem)[1] == pytest.approx(stats.sem(values[:, 0]))


def test_clustered_stderr_of_unequal_clusters():
    """The sandwich by hand: clusters (1, 1, 0) and (0,), mean 1/2."""
    mean, error = mean_and_stderr([1, 1, 0, 0], ["a", "a", "a", "b"])
    assert mean == 0.5 and error == pytest.approx(math.sqrt((0.5**2 + 0.5**2) * 2) / 4)


def test_stderr_degenerate():
    assert mean_and_stderr([]) == (None, None)
    assert mean_and_stderr([1.0]) == (1.0, None)
    assert mean_and_stderr([1, 0], ["a", "a"]) == (0.5, None)
    assert mean_and_stderr([1, 1]) == (1.0, 0.0)


# ---------------------------------------------------------------- single votes


def test_answer_classes_merge_equivalent_answers():
    calls = []

    def equivalent(answer, founder):
        calls.append((answer, founder))
        return float(answer) == float(founder)

    answers = ["2", None, "2.0", "3", "2", "3.00", "2.0"]
    assert answer_classes(answers, equivalent).tolist() == [0, -1, 0, 1, 0, 1, 0]
    assert calls == [("2.0", "2"), ("3", "2"), ("3.00", "2"), ("3.00", "3")]   # repeats are free
    assert answer_classes([], equivalent).tolist() == []
    assert answer_classes([None], equivalent).tolist() == [-1]


def test_an_equality_that_raises_is_no_equality_and_is_counted():
    def equivalent(answer, founder):
        if "%%%" in answer:
            raise RecursionError("nested too deeply")
        return float(answer) == float(founder)

    asked = safely(equivalent)
    assert answer_classes(["1", "5%%%", "1.0", "5%%%", "2"], asked).tolist() == [0, 1, 0, 1, 2]
    # asked once about 5%%% = 1, and once about 2 = 5%%% (float() cannot read it)
    assert asked.errors == 2
    # who does not count loses nothing else
    assert answer_classes(["1", "5%%%", "1.0"], equivalent).tolist() == [0, 1, 0]
    rows = [rollout(0, a) for a in ("4", "5%%%", "4.0", "9")]
    entry = summarise(rows, equivalent)
    assert entry["majority_vote"]["4"] == pytest.approx(0.5)
    # 5%%% = 4, 9 = 5%%%
    assert entry["checker_errors"] == 2
    rows[0]["checker_error"] = "RecursionError: ..."  # and one raised while r_v was decided
    assert summarise(rows, equivalent)["checker_errors"] == 3


def test_tally():
    table = tally([0, 1, 0, -1], [0.5, 1.5, 0.25, None])
    assert [(c.answer_class, c.votes, c.weight, c.first) for c in table] == [
        (0, 2, 0.75, 0), (1, 1, 1.0, 1), (-1, 1, 0.0, 3)]


def test_votes_by_hand():
    classes, score = [0, 1, 0, -1, -1, -1], [0.2, 0.9, 0.1, 1.0, 1.0, 1.0]
    assert majority_vote(classes) == 0                  # no answer never wins, however many
    assert weighted_vote(classes, score) == 1
    assert majority_vote([1, 0, 0, 1]) == 1             # a tie: first seen
    assert weighted_vote([1, 0, 0], [-1, -2, None]) == 0    # nobody is believed: the majority
    assert weighted_vote([0, 1, 0], [0.1, 0.3, 0.2]) == 0   # 0.1 + 0.2 is a tie with 0.3
    assert majority_vote([-1, -1]) == -1 and weighted_vote([-1], [1.0]) == -1
    assert majority_vote([]) == -1


def test_vote_change_probability_by_hand():
    # 3.0 against 0.5: two more solutions of weight 1 cannot turn it, four can.
    classes, score = [0, 0, 0, 1], [1.0, 1.0, 1.0, 0.5]
    assert vote_change_probability(classes, score, 2) == 0.0
    assert 0.0 < vote_change_probability(classes, score, 4) < 0.2
    assert vote_change_probability(classes, score, 0) == 0.0
    assert vote_change_probability([-1, -1], [1.0, 1.0], 5) == 1.0     # no answer to keep yet
    assert vote_change_probability([], [], 0) == 0.0
    # A close race is open; a long lead is safer with more solutions behind it.
    assert vote_change_probability([0, 1], [0.6, 0.5], 30) > 0.4
    few, many = (vote_change_probability([0] * n, [0.9] * n, 16) for n in (2, 16))
    assert few > 0.05 > many
    # One answer so far: every other time the next one is heavier than it, as heavy as can be.
    # Twelve copies of weight 0.05 (0.6 in all) then lose to a single one, else hardly ever.
    low = vote_change_probability([0] * 12, [0.05] * 12, 4)
    at_least_one = 1 - math.prod((12 + i) / (13 + i) for i in range(4))  # of four draws, unseen
    assert low == pytest.approx(at_least_one / 2, abs=0.03)


# (mean r_s of the right answer, of the others, spread, is the right one the commonest?)
WORLDS = {
    "believed": (0.8, 0.2, 0.15, True),
    "low": (0.3, 0.1, 0.08, True),
    "untrained": (0.05, 0.04, 0.03, True),
    "rare and believed": (1.0, 0.05, 0.03, False),
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_decision_changes_no_more_often_than_stated(name):
    """Votes of 32 stopped at a stated 5 %: in sum, what was stated covers what happened, also where
    r_s is low throughout, and where the right answer is rare but far heavier than the others."""
    right_mean, wrong_mean, spread, common = WORLDS[name]
    rng = np.random.default_rng(1)
    stated, changed, drawn, votes = [], 0, 0, 300
    for _ in range(votes):
        shares = rng.dirichlet(rng.choice([0.3, 1, 3]) * np.array([1.0, 0.7, 0.5, 0.3, 0.2]))
        right = shares.argmax() if common else rng.integers(5)
        classes = rng.choice(5, size=32, p=shares)
        score = rng.normal(np.where(classes == right, right_mean, wrong_mean), spread).clip(0, 1)
        for n in range(4, 36, 4):
            p = vote_change_probability(classes[:n], score[:n], 32 - n, draws=400)
            if n < 32 and p <= 0.05:
                stated.append(p)
                changed += weighted_vote(classes[:n], score[:n]) != weighted_vote(classes, score)
            if n == 32 or p <= 0.05:
                drawn += n
                break
    assert changed <= sum(stated)
    assert len(stated) > 0.7 * votes and drawn < 27 * votes  # and it does stop early


def test_stopping_early_keeps_its_promise():
    """Stop at an estimate of 5 %: at most 5 % of the votes would have come out otherwise."""
    rng = np.random.default_rng(0)
    stopped = changed = 0
    for _ in range(300):
        shares = rng.dirichlet([1.0, 0.7, 0.5, 0.3])
        classes = rng.choice(4, size=32, p=shares)
        score = np.clip(rng.normal(0.4 + 0.3 * (classes == 0), 0.3), 0, 1)
        for n in range(4, 32, 4):
            if vote_change_probability(classes[:n], score[:n], 32 - n, draws=400) <= 0.05:
                stopped += 1
                changed += weighted_vote(classes[:n], score[:n]) != weighted_vote(classes, score)
                break
    assert stopped > 200 and changed <= 0.05 * stopped


# ---------------------------------------------------------------- votes of k out of n


def brute_votes(classes, right, score, k):
    """Every subset, every winner of a tie: majority, weighted and best-of accuracies."""
    totals = np.zeros(3)
    subsets = list(itertools.combinations(range(len(classes)), k))
    for subset in subsets:
        valid = [i for i in subset if classes[i] != -1] or list(subset)
        votes = Counter(classes[i] for i in valid)
        weight = {c: math.fsum(min(1, max(0, score[i])) for i in valid if classes[i] == c)
                  for c in votes}
        top = max(votes.values())
        majority = [c for c in votes if votes[c] == top]
        heavy = [c for c in votes if weight[c] > max(weight.values()) - 1e-9]
        heavy = [c for c in heavy if votes[c] == max(votes[d] for d in heavy)]
        best = [i for i in valid if score[i] == max(score[j] for j in valid)]
        for slot, winners in ((0, majority), (1, heavy)):
            totals[slot] += np.mean([np.mean([right[i] for i in valid if classes[i] == c])
                                     for c in winners])
        totals[2] += np.mean([right[i] for i in best])
    return totals / len(subsets)


@pytest.mark.parametrize("seed", range(12))
def test_votes_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    classes = rng.integers(-1, 3, size=n)
    # Mostly a property of the class, sometimes not (an equality that is not transitive).
    right = (classes == 0) ^ (rng.random(n) < 0.1 * (seed % 2))
    score = rng.choice([-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5], size=n)
    for k in range(1, n + 1):
        majority, weighted, best = brute_votes(classes, right, score, k)
        got = votes_at_k(classes, right, score, k)
        assert got == pytest.approx((majority, weighted))
        assert best_of_at_k(right, score, k, classes) == pytest.approx(best)
        subsets = itertools.combinations(right, k)
        assert pass_at_k(right, k) == pytest.approx(np.mean([any(s) for s in subsets]))


@pytest.mark.parametrize("seed", range(4))
def test_one_vote_is_the_accuracy(seed):
    rng = np.random.default_rng(seed)
    right, classes, score = rng.random(10) < 0.5, rng.integers(0, 4, size=10), rng.normal(size=10)
    for value in (*votes_at_k(classes, right, score, 1), pass_at_k(right, 1),
                  best_of_at_k(right, score, 1)):
        assert value == pytest.approx(right.mean())


def test_ties_are_the_mean_over_orders():
    """Sharing a tie evenly is what first-seen gives on average over the order of the solutions."""
    classes, right = [0, 1, 1, 0, 2], [1, 0, 0, 1, 0]
    orders = list(itertools.permutations(range(5)))
    first_seen = np.mean([majority_vote([classes[i] for i in order]) == 0 for order in orders])
    assert votes_at_k(classes, right, [0] * 5, 5)[0] == pytest.approx(first_seen)


def test_equal_weights_make_the_weighted_vote_the_majority():
    rng = np.random.default_rng(5)
    classes = rng.integers(-1, 4, size=8)
    for score in ([0.0] * 8, [1.0] * 8, [None] * 8, [-3.0] * 8):
        for k in (1, 4, 8):
            majority, weighted = votes_at_k(classes, classes == 0, score, k)
            assert majority == pytest.approx(weighted)


def test_random_subsets_are_close_to_all_of_them(monkeypatch):
    rng = np.random.default_rng(6)
    classes, score = rng.permutation(14) // 4, rng.random(14)       # 4, 4, 4 and 2 votes
    right = classes == 0
    drawn = votes_at_k(classes, right, score, 7)                   # C(14, 7) = 3432: drawn
    metrics._subsets.cache_clear()
    monkeypatch.setattr(metrics, "EXACT_SUBSETS", 10_000)
    exact = votes_at_k(classes, right, score, 7)
    metrics._subsets.cache_clear()
    assert drawn != exact and drawn == pytest.approx(exact, abs=0.06)   # 0.016 * about 4


def test_k_out_of_range():
    for call in (lambda k: pass_at_k([1, 0], k), lambda k: best_of_at_k([1, 0], [0, 1], k),
                 lambda k: votes_at_k([0, 1], [1, 0], [0, 1], k)):
        for k in (0, 3):
            with pytest.raises(ValueError, match="cannot take k"):
                call(k)


def test_vote_sizes():
    assert vote_sizes(0) == [] and vote_sizes(1) == [1] and vote_sizes(8) == [1, 2, 4, 8]
    assert vote_sizes(12) == [1, 2, 4, 8, 12]


# ---------------------------------------------------------------- results.json


def rollout(prompt_id, answer, gold="4", r_s=0.5, tokens=10, finished=True):
    return {"problem": f"problem {prompt_id}", "gold": gold, "response": "...", "answer": answer,
            "r_v": int(answer == gold), "r_s": r_s, "logp_zc": None if r_s is None else -20.0,
            "finished": finished, "response_tokens": tokens, "prompt_id": prompt_id}


def benchmark_rows(problems=40, n=8, seed=0):
    """A believable data set: problems of different difficulty, a score that knows something."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(problems):
        difficulty = rng.random()
        for _ in range(n):
            right = rng.random() > difficulty
            answer = "4" if right else None if rng.random() < 0.1 else str(rng.integers(5, 9))
            cut = not right and rng.random() < 0.1
            rows.append(rollout(p, answer, r_s=None if cut else rng.normal(0.4 + 0.3 * right, 0.3),
                                tokens=int(rng.integers(5, 40)), finished=not cut))
    return rows


def test_summarise_has_the_keys_of_results_json():
    rows = benchmark_rows()
    entry = summarise(rows, same)
    assert list(entry) == ["problems", "n", "accuracy", "accuracy_stderr", "majority_vote",
                           "weighted_vote", "best_of", "pass_at", "verification",
                           "mean_response_tokens", "finished_share", "checker_errors"]
    assert {"f1", "accuracy_correct", "accuracy_wrong", "auroc", "ece", "brier", "spearman_length",
            "auroc_within", "mean_r_s_correct", "mean_r_s_wrong"} <= set(entry["verification"])
    assert (entry["problems"], entry["n"]) == (40, 8)
    right = np.array([row["r_v"] for row in rows])
    assert entry["accuracy"] == pytest.approx(right.mean())
    assert entry["accuracy_stderr"] == pytest.approx(stats.sem(right.reshape(40, 8).mean(axis=1)))
    for method in ("majority_vote", "weighted_vote", "best_of", "pass_at"):
        assert list(entry[method]) == ["1", "2", "4", "8"]
        assert entry[method]["1"] == pytest.approx(entry["accuracy"])
        assert entry[method]["8"] <= entry["pass_at"]["8"] + 1e-12
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert summarise(rows, same) == entry                          # the same numbers every time
    assert summarise(rows, same, votes=vote_tables(rows, same)) == entry


def test_summarise_does_not_depend_on_the_order_of_the_rows():
    rows = benchmark_rows(seed=2)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    a, b = summarise(rows, same), summarise(shuffled, same)
    assert a["verification"] == pytest.approx(b["verification"])
    for method in metrics.METHODS:
        assert a[method] == pytest.approx(b[method])


def test_verification_variants():
    rows = [rollout(0, "4", r_s=0.9), rollout(0, "5", r_s=0.1), rollout(1, None, r_s=0.9),
            rollout(1, "5", r_s=None, finished=False), rollout(1, "4", r_s=0.2)]
    result = verification(rows)
    assert result["accuracy_correct"] == 0.5
    assert result["accuracy_wrong"] == 1.0             # no answer, no score: both judged wrong
    assert result["f1"] == pytest.approx(2 / 3)
    assert result["f1_all"] == result["f1"] and result["f1_filtered"] == pytest.approx(2 / 3)
    # The score itself is judged where there is one: 0.9 of the row without an answer is a mistake.
    assert result["mean_r_s_wrong"] == pytest.approx(0.5)
    assert result["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(
        [1, 0, 0, 1], [0.9, 0.1, 0.9, 0.2]))
    assert result["auroc_within"] == 0.5


@pytest.mark.parametrize("rows", [
    [],
    [rollout(0, "4")],
    [rollout(0, None, r_s=None, finished=False)],
    [rollout(p, "4", r_s=1.0) for p in range(3) for _ in range(4)],
    [rollout(p, "5", r_s=0.0) for p in range(3) for _ in range(4)],
    [rollout(0, "4"), rollout(0, "5"), rollout(1, "4")],           # unequal n
    [rollout(0, "4", r_s=float("nan")), rollout(1, "5", r_s=float("nan"))],
], ids=["empty", "one", "one cut off", "all right", "all wrong", "unequal", "nan scores"])
def test_summarise_degenerate(rows):
    entry = summarise(rows, same)
    text = json.dumps(entry, allow_nan=False)                      # raises on NaN
    assert json.loads(text) == entry
    assert entry["problems"] == len({row["prompt_id"] for row in rows})


def test_summarise_empty_is_null_not_zero():
    entry = summarise([], same)
    assert entry["accuracy"] is None and entry["majority_vote"] == {} and entry["n"] == 0
    assert set(entry["verification"].values()) == {None}


def test_summarise_unequal_counts_use_the_smallest():
    entry = summarise([rollout(0, "4"), rollout(0, "5"), rollout(1, "4")], same)
    assert entry["n"] == 1 and entry["accuracy"] == pytest.approx(2 / 3)
    assert entry["majority_vote"] == {"1": 0.75}                   # a mean over problems


def test_summarise_names_what_a_row_lacks():
    row = rollout(0, "4")
    for key in ("r_v", "r_s", "answer", "finished", "response_tokens"):
        broken = {k: v for k, v in row.items() if k != key}
        with pytest.raises(ValueError, match=f"row 2 has no {key}"):
            summarise([row, broken], same)
    with pytest.raises(ValueError, match="neither prompt_id nor problem"):
        summarise([row | {"prompt_id": None, "problem": None}], same)


def test_summarise_is_fast_enough():
    """500 problems x 32 solutions is an afternoon of sampling; the numbers must take seconds."""
    rows = benchmark_rows(500, 32)
    start = time.process_time()
    summarise(rows, same)
    assert time.process_time() - start < 20            # about 1.5 s, whatever else runs


# ---------------------------------------------------------------- how sure is a number?


def test_bootstrap_of_a_paired_mean_is_the_normal_interval():
    rng = np.random.default_rng(0)
    a = rng.random(400)
    b = a + rng.normal(0.05, 0.1, size=400)
    result = bootstrap(lambda i, _: float((b[i] - a[i]).mean()), 400, draws=2000)
    error = stats.sem(b - a)
    assert result.value == pytest.approx((b - a).mean())
    assert result.low == pytest.approx((b - a).mean() - 1.96 * error, abs=0.2 * error)
    assert result.high == pytest.approx((b - a).mean() + 1.96 * error, abs=0.2 * error)


def test_bootstrap_knows_that_three_runs_are_three():
    """Runs that differ by far more than their problems can explain: the interval spans them."""
    accuracy = np.array([0.2, 0.5, 0.8])[:, None] + np.random.default_rng(0).normal(0, 0.01, 50)
    of = lambda p, r: float(accuracy[np.ix_(r, p)].mean())  # noqa: E731
    wide = bootstrap(of, 50, runs=3)
    assert wide.value == pytest.approx(0.5, abs=0.01)
    assert wide.low < 0.31 and wide.high > 0.69  # as if the runs were all there is to know
    narrow = bootstrap(lambda p, _: of(p, [0, 1, 2]), 50)
    assert narrow.high - narrow.low < 0.02


def test_bootstrap_covers_what_it_says():
    """Of 200 experiments with known truth, 95 % intervals miss some 5 %."""
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(200):
        problem = rng.normal(0, 1, size=60)  # how easy each problem is, for all solutions of it
        x = problem[:, None] + rng.normal(0, 1, size=(60, 8))
        low, high = bootstrap(lambda i, _: float(x[i].mean()), 60, draws=200)[1:]
        missed += not low <= 0 <= high
    # 10 expected, binomial spread 3; solutions taken for independent would miss over 60
    assert 2 <= missed <= 25


def test_bootstrap_degenerate():
    assert bootstrap(lambda i, r: None, 3) == (None, None, None)
    assert bootstrap(lambda i, r: 1.0, 1) == (1.0, None, None)
    assert bootstrap(lambda i, r: 1.0, 0) == (None, None, None)
    # defined for the whole, but for hardly any draw
    assert bootstrap(lambda i, r: 1.0 if len(set(i)) == 9 else None, 9) == (1.0, None, None)


def test_right_by_rank():
    rows = [rollout(0, "4", r_s=0.1), rollout(0, "5", r_s=0.9), rollout(0, "4", r_s=1.7),
            rollout(1, None, r_s=2.0), rollout(1, "4", r_s=None, finished=False),
            rollout(1, "5", r_s=-3.0)]  # fmt: skip
    # problem 0: right, wrong, right; problem 1: the wrong one has an r_s, the box beats the rest
    assert right_by_rank(rows) == [0.5, 0.5, 0.5]
    rows = benchmark_rows()
    ranks, entry = right_by_rank(rows), summarise(rows, same)
    assert ranks[0] == pytest.approx(entry["best_of"]["8"])
    assert np.mean(ranks) == pytest.approx(entry["accuracy"])
    assert right_by_rank([]) == []


def test_f1_of_solutions_cut_off_after_their_box():
    """45 % cut off after a box: the authors' script reads r_s as if they had ended there."""
    rows = [dict(row, r_s_if_ended=None) for row in benchmark_rows(60)]
    cut = [dict(row, r_s=None, finished=False, r_s_if_ended=row["r_s"]) if i % 20 < 9 else row
           for i, row in enumerate(rows)]
    whole, ended = verification(rows), verification(cut)
    for name in ("f1", "f1_all", "f1_filtered"):
        assert ended[name] == pytest.approx(whole[name])
    # where nobody has read it there, they count as judged wrong, under both names
    unread = verification([dict(row, r_s_if_ended=None) for row in cut])
    assert unread["f1_all"] < 0.8 * whole["f1_all"]
    assert unread["accuracy_wrong"] > whole["accuracy_wrong"]
    # the two names differ by the solutions without an answer, which are all judged wrong
    boxed = [row for row in rows if row["answer"] is not None]
    assert len(boxed) < len(rows) and whole["f1_filtered"] == verification(boxed)["f1"]
    assert whole["f1_all"] > whole["f1_filtered"]
    # r_s itself is measured where it was read after a real end
    assert ended["auroc"] == verification([r for r in cut if r["finished"]])["auroc"]


# ---------------------------------------------------------------- two runs on the same problems


def test_compare():
    rows_a, rows_b = benchmark_rows(seed=0), benchmark_rows(seed=1)
    problems, table = compare(rows_a, rows_b, same, draws=200)
    assert problems == 40
    assert table["accuracy"].a == pytest.approx(np.mean([row["r_v"] for row in rows_a]))
    a = summarise(rows_a, same)
    assert table["majority_vote@8"].a == pytest.approx(a["majority_vote"]["8"])
    assert table["weighted_vote@8"].a == pytest.approx(a["weighted_vote"]["8"])
    assert table["best_of@8"].a == pytest.approx(a["best_of"]["8"])
    for name in ("f1", "auroc", "auroc_within", "ece", "brier"):
        assert table[name].a == pytest.approx(a["verification"][name])
        assert statistics(rows_a, same)[name](np.arange(40)) == pytest.approx(table[name].a)
        assert table[name].low <= table[name].difference <= table[name].high
    _, same_run = compare(rows_a, rows_a, same, draws=50)
    assert all(d.difference == d.low == d.high == 0 for d in same_run.values())


def test_compare_takes_what_both_have():
    rows_a, rows_b = benchmark_rows(6, 4), benchmark_rows(4, 8)
    for row in rows_b:
        row["prompt_id"] += 100                        # numbered otherwise: the text decides
    problems, table = compare(rows_a, rows_b, same, draws=20)
    assert problems == 4 and "majority_vote@4" in table
    with pytest.raises(ValueError, match="no problem in common"):
        compare(rows_a, [rollout(77, "4")], same)
