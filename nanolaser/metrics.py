"""What a set of solutions says about a model: accuracy, self-verification, votes.

Pure functions of numbers, numpy only.  A *solution* is one sampled response; `right` is its r_v (1
right, 0 wrong), `score` its r_s, and its *class* the id of its answer among the answers of the
same problem: equivalent answers share an id, and -1 is no answer at all.

Three conventions hold throughout:
- What is undefined (the AUROC of solutions that are all right, a standard error from one problem)
  is None, which JSON writes as null.  Never NaN: it is not JSON, and it compares as false.
- Ranks are taken of r_s as it is; probabilities and vote weights are r_s clipped to [0, 1].
- A solution that was cut off has no r_s (None).  It counts as judged wrong, weighs nothing in a
  vote, and is left out where the quality of r_s itself is measured.

Unless a function says otherwise, its arrays are (N,), one number a solution, and it raises
ValueError where they differ in length or a score is missing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Above this many subsets, votes of k out of n solutions are averaged over DRAWS random subsets
# instead of over all of them.  C(16, 4) = 1820 is still exact; C(32, 4) = 35960 is not.  The error
# of 1000 draws on one problem is at most 0.016 (one standard deviation), under 0.001 over 500.
EXACT_SUBSETS = 2000
DRAWS = 1000
# Sums of the same weights in another order differ in the last bits: below this they are a tie.
TIE = 1e-9

NO_ANSWER = -1
Rows = Sequence[Mapping[str, Any]]  # rollout rows, as in samples.jsonl
Equivalent = Callable[[str, str], bool]  # checker.is_equivalent, mostly


# ---------------------------------------------------------------- is r_s right about the solutions?


# The paper's F1 and the two accuracies it is made of, each in [0, 1] or None.
VerificationF1 = namedtuple("VerificationF1", "f1 accuracy_correct accuracy_wrong")


def verification_f1(right: Any, score: Any, threshold: float = 0.5) -> VerificationF1:
    """Harmonic mean of the verdict's accuracy on right and on wrong solutions (paper, evaluation);
    None where one of the kinds is missing.  A missing score is the verdict "wrong"."""
    right, score = _pair(right, score, gaps=True)
    verdict = score > threshold  # NaN (no score) compares as False, which is the verdict wanted
    # Not the usual F1: both kinds count the same however many there are, and always answering
    # "right" gets 0.
    correct, wrong = _mean(verdict[right]), _mean(~verdict[~right])
    if correct is None or wrong is None:
        return VerificationF1(None, correct, wrong)
    f1 = 2 * correct * wrong / (correct + wrong) if correct + wrong else 0.0
    return VerificationF1(f1, correct, wrong)


def fit_threshold(right: Any, score: Any) -> float:
    """The threshold with the best F1 on solved problems, the middle one of several; ValueError
    where one of the kinds is missing.  Scores may be missing."""
    # r_s is trained towards 0 and 1 on the problems of the training; on harder ones it shrinks, and
    # 0.5 is no longer where right and wrong part.
    right, score = _pair(right, score, gaps=True)
    if right.all() or not right.any():
        kinds = "no" if not len(right) else "only right" if right.any() else "only wrong"
        raise ValueError(f"{kinds} solutions: a threshold lies between right and wrong ones")
    # Scores .2 .4 .9: between them lie .3 and .65; below and above, two more that judge all alike.
    known = np.unique(score[~np.isnan(score)])  # sorted
    between = (known[1:] + known[:-1]) / 2
    candidates = [*(known[:1] - 1), *between, *(known[-1:] + 1)] or [0.5]
    f1 = np.array([verification_f1(right, score, t).f1 for t in candidates])
    best = np.flatnonzero(f1 >= f1.max() - TIE)
    return float(candidates[best[len(best) // 2]])


def auroc(right: Any, score: Any) -> float | None:
    """Probability that a right solution scores above a wrong one, ties counting half; in [0, 1]."""
    # By ranks in N log N, not by the N^2 pairs of the definition: benchmarks have 16000 solutions.
    # Right 0.9 0.4, wrong 0.6 0.4: won 0.9 > 0.6, 0.9 > 0.4, half of 0.4 = 0.4: 2.5 of 4 pairs.
    wins, pairs = _wins(*_pair(right, score))
    return wins / pairs if pairs else None


def auroc_within(right: Any, score: Any, problem: Any) -> float | None:
    """AUROC over the pairs of a right and a wrong solution of the same problem; in [0, 1]."""
    # Plain AUROC can be high by telling easy problems from hard ones; only this one says that r_s
    # tells solutions apart, which is what a vote needs.
    ids, problem = np.unique(problem, return_inverse=True)
    _columns(score, problem)
    # Sums before the division: a problem with 16 pairs says more than one with a single pair.
    wins, pairs = _wins_by_problem(*_pair(right, score), problem, len(ids))
    return float(wins.sum() / pairs.sum()) if pairs.sum() else None


def reliability(right: Any, score: Any, bins: int = 10) -> list[dict[str, Any]]:
    """The reliability diagram: {low, high, count, score, accuracy} of each equal-width bin of
    clipped score, the last two being means, None in an empty bin."""
    right, score = _pair(right, score)
    score, edges = _clip(score), np.linspace(0, 1, bins + 1)
    # Bins are (low, high], so that a score of exactly 0.5 lies on the side on which the verdict
    # `score > 0.5` puts it.  Only the inner edges: left of the first is bin 0, 0 itself included.
    index = np.searchsorted(edges[1:-1], score, side="left")
    return [{"low": float(edges[b]), "high": float(edges[b + 1]), "count": int((index == b).sum()),
             "score": _mean(score[index == b]), "accuracy": _mean(right[index == b])}
            for b in range(bins)]


def ece(right: Any, score: Any, bins: int = 10) -> float | None:
    """Expected calibration error: mean |accuracy - score| over bins, weighted by count; [0, 1]."""
    table = [row for row in reliability(right, score, bins) if row["count"]]
    total = sum(row["count"] for row in table)
    # The gap is between two means of one bin, so that errors inside a bin cancel: with few bins
    # the ECE flatters.
    gaps = sum(row["count"] * abs(row["accuracy"] - row["score"]) for row in table)
    return gaps / total if total else None


def brier(right: Any, score: Any) -> float | None:
    """Mean squared difference of the clipped score and the truth; in [0, 1]."""
    # Always saying 0.4 where 40 % are right is calibrated perfectly (ECE 0) and useless: 0.24.
    right, score = _pair(right, score)
    return _mean((_clip(score) - right) ** 2)


def coverage_curve(right: Any, score: Any) -> np.ndarray:
    """Accuracy of the 1, 2, ... N most believed solutions, (N,): what is right of what is left if
    one keeps so many and leaves the others unanswered.  Equal scores count as their mean."""
    # Right 1 0 1 0 of scores .9 .5 .5 .1 count as 1, 1/2, 1/2, 0: the curve is 1, 3/4, 2/3, 1/2.
    right, score = _pair(right, score)
    order = np.argsort(-score, kind="stable")
    group = np.unique(-score[order], return_inverse=True)[1]
    share = np.bincount(group, weights=right[order]) / np.maximum(np.bincount(group), 1)
    return np.cumsum(share[group]) / np.arange(1, len(score) + 1)


def risk_coverage(right: Any, score: Any) -> dict[str, float | None]:
    """aurc, the area under 1 - coverage_curve (Geifman et al. 2018; 0 is best, and a guess has the
    share of wrong solutions), and accuracy_at_50, _80, _90: of so many per cent most believed."""
    curve, found = coverage_curve(right, score), {}
    found["aurc"] = _mean(1 - curve)
    for c in (50, 80, 90):
        count = -(-c * len(curve) // 100)  # rounded up, 3 of 5 for 50 %: never fewer than asked for
        found[f"accuracy_at_{c}"] = float(curve[count - 1]) if count else None
    return found


def spearman(x: Any, y: Any) -> float | None:
    """Rank correlation of x and y, ties at their mean rank; in [-1, 1].  None where one of them
    does not vary: there is no order to agree with."""
    # Pearson's correlation of the ranks; with ties the short formula would be wrong.
    x, y = (_midranks(values) - (len(values) + 1) / 2 for values in _columns(x, y))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    # Rounding can carry a perfect correlation past 1.
    return max(-1.0, min(1.0, float(x @ y) / scale)) if scale else None


def mean_and_stderr(values: Any, problem: Any = None) -> tuple[float | None, float | None]:
    """Mean of values and its standard error, clustered by problem where that is given."""
    # Solutions of one problem are alike: taking 32 of each for independent would make the error up
    # to sqrt(32) times too small.  So deviations are summed per problem first (the sandwich
    # estimator).  Without problems every value is a cluster of its own: the ordinary formula.
    if not len(values):
        return None, None
    owner = np.arange(len(values)) if problem is None else problem
    cluster = np.unique(owner, return_inverse=True)[1]
    values, _ = _columns(values, cluster)
    mean = float(values.mean())
    sums = np.bincount(cluster, weights=values - mean)     # (P,)
    if len(sums) < 2:
        return mean, None
    correction = len(sums) / (len(sums) - 1)
    return mean, math.sqrt(float(sums @ sums) * correction) / len(values)


# ---------------------------------------------------------------- one decision from many solutions


# One distinct answer of a problem: its class (NO_ANSWER for the solutions without one), how many
# solutions gave it, the sum of their clipped r_s, and the index of the first of them.
Candidate = namedtuple("Candidate", "answer_class votes weight first")


def safely(equivalent: Equivalent) -> Equivalent:
    """`equivalent`, except that one that raises says "not equal"; `errors` of the result counts."""
    # A verdict on model output must not end an hour of evaluation, and must not hide either.
    def ask(answer: str, other: str) -> bool:
        try:
            return equivalent(answer, other)
        except Exception:
            ask.errors += 1
            return False

    ask.errors = 0
    return ask


def answer_classes(answers: Sequence[str | None], equivalent: Equivalent) -> np.ndarray:
    """Class ids (n,) of the answers of one problem: 0, 1, ... as first seen, -1 for None.  Where
    `equivalent` raises, two answers differ."""
    # Equality is not always transitive (rounded decimals): each answer joins the oldest class whose
    # first answer it equals, a definite result for a given order.
    # 1/2, 0.5, none, 3, 1/2, 0.50, 3 are the classes 0 0 -1 1 0 0 1; asked was 0.5 = 1/2?  3 = 1/2?
    # 0.50 = 1/2?  Exact repeats, the common case, cost no comparison.
    equivalent = safely(equivalent)
    seen: dict[str | None, int] = {None: NO_ANSWER}
    founders: list[str] = []
    for answer in answers:
        if answer not in seen:
            # Lazily: each comparison may cost a millisecond of parsing.
            matches = (c for c, founder in enumerate(founders) if equivalent(answer, founder))
            seen[answer] = next(matches, len(founders))
            if seen[answer] == len(founders):
                founders.append(answer)
    return np.array([seen[answer] for answer in answers], dtype=int)


def vote_share(rows: Rows, equivalent: Equivalent) -> list[float]:
    """For each row the share of its problem's solutions that have its answer; 0 without one."""
    samples, share = _group(rows), np.zeros(len(rows))
    for where in samples.where:
        classes = answer_classes([samples.answers[i] for i in where], equivalent)
        same = (classes[:, None] == classes) & (classes != NO_ANSWER)  # (n, n)
        share[where] = same.mean(1)
    return share.tolist()


def tally(classes: Any, score: Any = None) -> list[Candidate]:
    """The candidates of one problem in the order they were first seen, no answer being one of them;
    without scores every weight is 0."""
    score = [None] * len(classes) if score is None else score
    classes, weights = _columns(classes, score, gaps=True)
    weights, candidates = _clip(weights), []
    # In the order of first appearance, which np.unique would lose: it decides ties.
    for c in dict.fromkeys(classes.astype(int).tolist()):
        members = np.flatnonzero(classes == c)
        # fsum rounds once: the order of the solutions cannot make or break a tie.
        candidates.append(Candidate(c, len(members), math.fsum(weights[members]), int(members[0])))
    return candidates


def majority_vote(classes: Any) -> int:
    """The class with the most votes; ties go to the one seen first.  -1 where none has an answer.
    One fixed decision for one set of solutions; how well such votes do is `votes_at_k`'s matter."""
    return weighted_vote(classes, None)


def weighted_vote(classes: Any, score: Any) -> int:
    """The class with the largest sum of clipped r_s, then of votes, then seen first; -1 if none."""
    table = _by_weight(classes, score)
    return table[0].answer_class if table else NO_ANSWER


def _by_weight(classes: Any, score: Any) -> list[Candidate]:
    """The candidates that have an answer, the winner first."""
    # Votes decide when no solution is believed at all (every weight is 0): the vote then falls back
    # to the majority instead of to an arbitrary answer.  Sorting keeps the order of equals, which
    # is that of first appearance.
    table = [c for c in tally(classes, score) if c.answer_class != NO_ANSWER]
    return sorted(table, key=lambda c: (-round(c.weight / TIE), -c.votes))


def vote_change_probability(classes: Any, score: Any, remaining: int, draws: int = 2000) -> float:
    """Estimated probability that `remaining` more solutions would change the weighted vote of those
    so far.  Exactly 0 where nothing could change it; 1 while there is no answer to keep."""
    # The future is drawn from the past (a Bayesian bootstrap: every seen solution, and one that
    # nobody has seen, recurs with a random share).  The unseen one is a bad case, so that stopping
    # errs on the side of going on: always the same new answer, and heavy.
    table = _by_weight(classes, score)
    if not table:
        return 1.0 if remaining else 0.0
    # Columns: the answers so far, the leader first, and last the one that may still turn up.
    total = np.array([c.weight for c in table] + [0.0])
    # Each new solution weighs at most 1.
    if total[0] - total[1:].max() > remaining + TIE or not remaining:
        return 0.0
    classes, weight = _columns(classes, score, gaps=True)
    weight = _clip(weight)
    # What one more copy of each solution adds: (n, answers + 1), no answer adds nothing.
    adds = np.zeros((len(classes), len(total)))
    for i, c in enumerate(table):
        adds[:, i] = weight * (classes == c.answer_class)
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(len(adds) + 1), size=draws)         # (draws, n + 1)
    copies = rng.multinomial(remaining, shares)                        # (draws, n + 1)
    # How heavy is the unseen one?  The last of k + 1 answers in any order is the heaviest of them
    # with probability 1 / (k + 1): so often it weighs 1, the most there is, and else what the
    # heaviest solution so far does.  (Always 1 would never stop where r_s is low throughout.)
    unseen = np.where(rng.random(draws) < 1 / (len(table) + 1), 1.0, weight.max())
    final = total + copies[:, :-1] @ adds                              # (draws, answers + 1)
    final[:, -1] += copies[:, -1] * unseen
    # A tie with the leader counts as a change: who wins it would be a matter of votes and order.
    return float((final[:, 1:].max(axis=1) >= final[:, 0] - TIE).mean())


# ---------------------------------------------------------------- how good are votes of k out of n?


def vote_sizes(n: int) -> list[int]:
    """The k at which votes are reported: powers of two up to n, and n."""
    return [2**i for i in range(n.bit_length()) if 2**i < n] + [n] * (n > 0)


def pass_at_k(right: Any, k: int) -> float:
    """Probability that k of the n solutions hold a right one: 1 - C(n - c, k) / C(n, k), the
    unbiased estimator of Chen et al. (2021), equation 1.  ValueError if k > n."""
    # 8 solutions, 2 right, k = 4: C(6, 4) = 15 of C(8, 4) = 70 subsets have none, 1 - 15/70 = 0.79.
    (right,) = _columns(right)
    return 1.0 - math.comb(int((right <= 0.5).sum()), k) / _subset_count(len(right), k)


def best_of_at_k(right: Any, score: Any, k: int, classes: Any = None) -> float:
    """Expected accuracy of the highest-scored of k of the n solutions, exact for any n; in [0, 1].
    Solutions of equal score are picked evenly.  ValueError if k > n."""
    right, score = _pair(right, score, gaps=True)
    key, n = _rank_key(score, classes), len(right)
    every = _subset_count(n, k)
    # The best of a subset has score s if it holds somebody with s and nobody above: of the subsets
    # that avoid the `above` better ones, take away those that avoid s as well.
    # Scores .9 .7 .2, k = 2: .9 is best in 2 of 3 subsets, .7 in 1, .2 in none.
    value, above = 0.0, 0
    for s in np.unique(key)[::-1]:
        tied = right[key == s]
        subsets = math.comb(n - above, k) - math.comb(n - above - len(tied), k)
        value += subsets / every * float(tied.mean())
        above += len(tied)
    return value


def votes_at_k(classes: Any, right: Any, score: Any, k: int) -> tuple[float, float]:
    """Expected accuracy of the majority and of the weighted vote over k of the n solutions of one
    problem, over all subsets of size k or DRAWS random ones.  ValueError if k > n."""
    # Tied classes share the win evenly.  That is the expectation of breaking ties at random, and
    # also of taking the first seen (equal counts make every tied class equally often the first): no
    # luck of the order is left, so the mean is unbiased and k = 1 is exactly the accuracy.
    classes, right, score = _columns(classes, right, score, gaps=True)
    # All subsets at once as matrix products: a loop over 1000 subsets of 500 problems would take
    # minutes.  Both votes see the same subsets: the draw does not blur their difference.
    subsets = _subsets(len(right), k)                                  # (S, n) of 0 and 1
    ids, column = np.unique(classes, return_inverse=True)
    member = np.eye(len(ids))[column]                                  # (n, M), M answers
    votes = subsets @ member                                           # (S, M)
    weights = subsets @ (member * _clip(score)[:, None])               # (S, M)
    rights = subsets @ (member * (right > 0.5)[:, None])               # (S, M)
    # A class outside the subset cannot win.  "No answer" wins only where there is nothing else, so
    # it gets less than any answer can have: half a vote, a negative weight.
    empty = ids == NO_ANSWER                                           # (M,)
    standing = np.where(votes > 0, np.where(empty, 0.5, votes), -np.inf)
    weights = np.where(votes > 0, np.where(empty, -1.0, weights), -np.inf)
    # Votes are whole numbers and tie exactly; weights are sums of fractions and need room.
    by_majority = standing == standing.max(axis=1, keepdims=True)
    by_weight = weights >= weights.max(axis=1, keepdims=True) - TIE
    # The same second criterion as in `weighted_vote`.
    second = np.where(by_weight, standing, -np.inf)
    by_weight = second == second.max(axis=1, keepdims=True)
    # What a class is worth: the share of its members that are right; all or none of them, save
    # where the checker's equality is not transitive.
    worth = rights / np.maximum(votes, 1)
    majority, weighted = (float(((worth * tied).sum(axis=1) / tied.sum(axis=1)).mean())
                          for tied in (by_majority, by_weight))
    return majority, weighted


METHODS = ("majority_vote", "weighted_vote", "best_of", "pass_at")


def vote_tables(rows: Rows, equivalent: Equivalent, sizes: Sequence[int] | None = None,
                by_text: bool = False) -> dict[str, dict[int, np.ndarray]]:
    """Method -> k -> the expected accuracy on each problem (P,), for k of `vote_sizes` or `sizes`:
    one number a problem is what means, standard errors and paired comparisons need."""
    samples = _group(rows, by_text)
    # Merging answers is the expensive part (it calls the checker): once a problem, not once a k.
    solutions = [(answer_classes([samples.answers[i] for i in where], equivalent),
                  samples.right[where], samples.score[where]) for where in samples.where]
    tables: dict[str, dict[int, np.ndarray]] = {method: {} for method in METHODS}
    for k in vote_sizes(samples.n) if sizes is None else sizes:
        values = [(*votes_at_k(classes, right, score, k),
                   best_of_at_k(right, score, k, classes), pass_at_k(right, k))
                  for classes, right, score in solutions]              # P times 4 numbers
        for method, column in zip(METHODS, np.array(values).T):
            tables[method][k] = column
    return tables


def right_by_rank(rows: Rows) -> list[float]:
    """Share of right solutions among each problem's best by r_s, its second best, ... (n numbers),
    those without an answer, then those without r_s, coming last.  The first is best-of-n."""
    # Where r_s tells the solutions of a problem apart the shares fall from the first to the last.
    # LaSeR on hard arithmetic once gave .58 .71 .72 .73 .70 .66 .59 .36: the last is rightly
    # distrusted, and the first looks easier than it is.
    samples = _group(rows)
    ranked = []
    for where in samples.where:
        answered = np.where(samples.answered[where], 0, NO_ANSWER)
        key = _rank_key(samples.score[where], answered)
        ranked.append(samples.right[where][np.argsort(-key, kind="stable")][:samples.n])
    return np.mean(ranked, axis=0).tolist() if ranked else []


# -------------------------------------------------------------- a data set's entry in results.json


def summarise(rows: Rows, equivalent: Equivalent,
              votes: Mapping[str, Mapping[int, np.ndarray]] | None = None) -> dict[str, Any]:
    """Everything that results.json says about one data set, from its rollout rows: r_v, r_s,
    answer, finished, response_tokens, and prompt_id or problem to tell the problems apart.  `votes`
    takes a result of `vote_tables`.  ValueError names a row that lacks something."""
    samples = _group(rows)
    if votes is None:
        equivalent = safely(equivalent)
        votes = vote_tables(rows, equivalent)
    accuracy, stderr = mean_and_stderr(samples.right, samples.problem)
    # What the checker raised, on a solution or where two answers were compared, is counted.
    failed = sum(row.get("checker_error") is not None for row in rows)
    return {
        "problems": len(samples.where), "n": samples.n, "accuracy": accuracy,
        "accuracy_stderr": stderr,
        # Text keys, as JSON will have them anyway: what is returned equals what is read back.
        **{m: {str(k): _mean(values) for k, values in votes[m].items()} for m in METHODS},
        "verification": verification(rows),
        "mean_response_tokens": _mean(samples.tokens),
        "finished_share": _mean(samples.finished),
        "checker_errors": failed + getattr(equivalent, "errors", 0),
    }


def verification(rows: Rows, threshold: float = 0.5) -> dict[str, float | None]:
    """How well r_s, or any score that the rows carry as r_s, knows right solutions from wrong.

    f1 is f1_all.  The two are those of the authors' evaluation script: f1_all over all solutions,
    one without an answer being judged wrong; f1_filtered over those with an answer.  All else
    measures the score itself, over the solutions that have one.
    """
    # Two questions, two sets: does the *system* judge its solutions well (f1_all: everything that
    # came out, and no box is a reason to say "wrong"), and is the *score* any good (where it is)?
    samples, everything = _group(rows), np.arange(len(rows))
    known = ~np.isnan(samples.score)
    f1 = _f1(samples, everything, threshold)
    right, score = samples.scored(everything)
    tokens = samples.tokens[known]
    return {
        "f1": f1.f1,
        "f1_all": f1.f1,
        "f1_filtered": _f1(samples, everything[samples.answered], threshold).f1,
        "accuracy_correct": f1.accuracy_correct,
        "accuracy_wrong": f1.accuracy_wrong,
        "auroc": auroc(right, score),
        "auroc_within": auroc_within(right, score, samples.problem[known]),
        "ece": ece(right, score),
        "brier": brier(right, score),
        "spearman_length": None if np.isnan(tokens).any() else spearman(score, tokens),
        "mean_r_s_correct": _mean(score[right]),
        "mean_r_s_wrong": _mean(score[~right]),
        **risk_coverage(right, score),
    }


def _f1(samples: _Samples, i: np.ndarray, threshold: float = 0.5) -> VerificationF1:
    """F1 of the system's verdicts on the solutions i."""
    # Where nobody was asked at all there are no verdicts, which are not bad ones.
    if np.isnan(samples.score).all() and np.isnan(samples.judged).all():
        return VerificationF1(None, None, None)
    return verification_f1(samples.right[i], samples.judged[i], threshold)


# ---------------------------------------------------------------- how sure is a number?
#
# 400 problems x 8 solutions are 400 pieces of evidence, not 3,200: the solutions of a hard problem
# are wrong together.  And three runs of a training are three, however many solutions each has.  So
# what is drawn anew in a bootstrap are whole problems, and whole runs:
#
#     problems 0 1 2 3, runs 0 1 2   ->   problems 2 0 2 3, runs 1 1 0   ->   the statistic of these
#
# a thousand times; 95 % of the values lie in the interval.  What was measured on the same problems
# is compared on the same draw: hard ones are hard for both sides, and that shared part cancels.


Interval = namedtuple("Interval", "value low high")  # None where it is undefined


def bootstrap(statistic: Callable[[np.ndarray, np.ndarray], float | None], problems: int,
              runs: int = 1, draws: int = 1000) -> Interval:
    """A statistic and its 95 % percentile interval, resampling problems and runs.  It takes indices
    of problems and of runs, with repeats, and gives a number or None."""
    value = statistic(np.arange(problems), np.arange(runs)) if problems else None
    # A single problem, resampled, is the same problem every time: that is no interval.
    if value is None or problems < 2:
        return Interval(value, None, None)
    rng = np.random.default_rng(0)  # the same draws for whatever is compared
    drawn = [statistic(rng.integers(problems, size=problems), rng.integers(runs, size=runs))
             for _ in range(draws)]
    # Draws that leave it undefined (all right, say) are skipped, if they are not most of them.
    drawn = [x for x in drawn if x is not None]
    if len(drawn) <= draws / 2:
        return Interval(value, None, None)
    return Interval(value, *map(float, np.quantile(drawn, [0.025, 0.975])))


# A metric of two runs: b - a with its interval; None where it is undefined.
Difference = namedtuple("Difference", "a b difference low high")


def compare(rows_a: Rows, rows_b: Rows, equivalent: Equivalent, draws: int = 1000
            ) -> tuple[int, dict[str, Difference]]:
    """Two runs on one data set: the number of problems both have, matched by their text, else by
    prompt_id, and metric -> Difference; ValueError where they have none in common."""
    groups = [_members(rows, by_text=True) for rows in (rows_a, rows_b)]
    # In the order of run a, for both: pairing is by position from here on.
    common = [key for key in groups[0] if key in groups[1]]
    if not common:
        raise ValueError("the two runs have no problem in common: nothing to compare")
    # Votes of as many solutions as every problem has in both runs.
    n = min(len(group[key]) for group in groups for key in common)
    a, b = (statistics([rows[i] for key in common for i in group[key]], equivalent, n)
            for rows, group in zip((rows_a, rows_b), groups))
    everything, table = np.arange(len(common)), {}
    for name in a:
        change = bootstrap(lambda problems, _: minus(b[name](problems), a[name](problems)),
                           len(common), draws=draws)
        table[name] = Difference(a[name](everything), b[name](everything), *change)
    return len(common), table


def minus(b: float | None, a: float | None) -> float | None:
    """b - a, None where one of them is."""
    return None if a is None or b is None else b - a


def statistics(rows: Rows, equivalent: Equivalent, n: int | None = None
               ) -> dict[str, Callable[[np.ndarray], float | None]]:
    """Metric -> statistic (indices of problems, in the order in which the rows first name them ->
    number or None) of one run; votes over n solutions."""
    samples = _group(rows, by_text=True)
    n, known = n or samples.n, ~np.isnan(samples.score)
    # Pairs never cross problems, so their counts can be taken before any resampling.
    wins, pairs = _wins_by_problem(samples.right[known], samples.score[known],
                                   samples.problem[known], len(samples.where))

    # A metric over the pooled solutions of the chosen problems; and one of those with a score.
    pooled = lambda metric: lambda problems: metric(  # noqa: E731
        np.concatenate([samples.where[p] for p in problems]))
    of_score = lambda metric: pooled(lambda i: metric(*samples.scored(i)))  # noqa: E731
    found = {"accuracy": pooled(lambda i: _mean(samples.right[i]))}
    for method, table in vote_tables(rows, equivalent, [n], by_text=True).items():
        found[f"{method}@{n}"] = lambda problems, x=table[n]: float(x[problems].mean())
    return found | {
        "f1": pooled(lambda i: _f1(samples, i).f1),
        "auroc": of_score(auroc), "ece": of_score(ece), "brier": of_score(brier),
        "auroc_within": lambda p: float(wins[p].sum() / pairs[p].sum()) if pairs[p].sum() else None,
        "response_tokens": pooled(lambda i: _mean(samples.tokens[i])),
    }


# ---------------------------------------------------------------- rows to arrays


@dataclass(frozen=True)
class _Samples:
    """The rows of one data set as arrays over N solutions, and who belongs to which problem."""

    right: np.ndarray         # (N,) bool
    score: np.ndarray         # (N,) r_s as it is, NaN where there is none
    judged: np.ndarray        # (N,) the score that a verdict goes by, NaN: it is "wrong"
    answered: np.ndarray      # (N,) bool
    tokens: np.ndarray        # (N,) length of the response, NaN where nobody counted
    finished: np.ndarray      # (N,) bool
    problem: np.ndarray       # (N,) 0 .. P-1
    answers: list             # N texts or None
    where: list[np.ndarray]   # P arrays of row indices, in the order of the rows
    n: int                    # solutions that every problem has

    def scored(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(right, score) of those of the solutions i that have a score."""
        i = i[~np.isnan(self.score[i])]
        return self.right[i], self.score[i]


def _group(rows: Rows, by_text: bool = False) -> _Samples:
    """Rows -> arrays; ValueError names the first row that lacks a key."""
    for i, row in enumerate(rows):
        for key in ("r_v", "r_s", "answer", "finished", "response_tokens"):
            if key not in row or (key == "r_v" and row[key] is None):
                raise ValueError(f"row {i + 1} has no {key}: metrics need it for every solution")
    where = [np.array(members) for members in _members(rows, by_text).values()]
    problem = np.zeros(len(rows), dtype=int)
    for p, members in enumerate(where):
        problem[members] = p
    # A column of floats: None becomes NaN, the mark of what is missing inside this file.
    column = lambda key: np.array([row.get(key) for row in rows], dtype=float)  # noqa: E731
    answers, score = [row["answer"] for row in rows], column("r_s")
    answered = np.array([answer is not None for answer in answers], dtype=bool)
    # A solution cut off after its box has an answer and no r_s.  The authors' script appends the
    # end that it did not come to and reads r_s there: `r_s_if_ended`, where evaluate.py has done
    # so too; else it counts as judged wrong.  Where nothing is cut off this makes no difference.
    judged = np.where(np.isnan(score), column("r_s_if_ended"), score)
    return _Samples(
        right=column("r_v") > 0.5, score=score, judged=np.where(answered, judged, np.nan),
        answered=answered, tokens=column("response_tokens"), finished=column("finished") > 0.5,
        problem=problem, answers=answers, where=where,
        n=min(map(len, where), default=0))


def _members(rows: Rows, by_text: bool) -> dict[Any, list[int]]:
    """Problem -> the indices of its rows.  prompt_id tells the problems of one run apart, the text
    those of several; each stands in for the other."""
    # Grouped by name, not by position: rows written as they finish come in any order.
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        names = [row.get(name) for name in ("problem", "prompt_id")]
        known = [x for x in (names if by_text else names[::-1]) if x is not None]
        if not known:
            raise ValueError(f"row {i + 1} has neither prompt_id nor problem: whose is it?")
        groups.setdefault(known[0], []).append(i)
    return groups


def _columns(*values: Any, gaps: bool = False) -> list[np.ndarray]:
    """(N,) floats of each, NaN for None; ValueError where they differ in length or, without `gaps`,
    a number is missing: a NaN would be ranked as if it were one."""
    columns = [np.asarray(x, dtype=float) for x in values]
    if len({len(x) for x in columns}) > 1:
        raise ValueError(f"arrays differ in length: {[len(x) for x in columns]}")
    if not gaps and any(np.isnan(x).any() for x in columns):
        raise ValueError("a solution has no score; leave those without one out first")
    return columns


def _pair(right: Any, score: Any, gaps: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """right (N,) bool, from r_v, and score (N,) float."""
    right, score = _columns(right, score, gaps=gaps)
    return right > 0.5, score


def _clip(score: np.ndarray) -> np.ndarray:
    # r_s is a log-ratio and leaves [0, 1] on both sides: a weight below 0 would be a vote against.
    return np.nan_to_num(np.clip(score, 0.0, 1.0))


def _mean(values: np.ndarray) -> float | None:
    """The mean, None without values or where one is unknown."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return None if math.isnan(mean) else mean


# ---------------------------------------------------------------- ranks, pairs, subsets


def quantiles(scores: Any) -> list[float]:
    """For each score of (N,) the share of the N that score lower, half of those equal included:
    in (0, 1), whatever the scale of the scores."""
    (scores,) = _columns(scores)
    return ((_midranks(scores) - 0.5) / max(1, len(scores))).tolist()


def _midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs; (N,) -> (N,)."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    # `last` is the rank of the last one of each group of equals; the mean lies half a group before.
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


def _wins(right: np.ndarray, score: np.ndarray) -> tuple[float, int]:
    """Pairs won by the right solution (a tie is half a win) and pairs in all."""
    # Mann-Whitney: the rank sum of the right ones, less what they would have among themselves.
    m = int(right.sum())
    wins = float(_midranks(score)[right].sum()) - m * (m + 1) / 2
    return wins, m * (len(right) - m)


def _wins_by_problem(right: np.ndarray, score: np.ndarray, problem: np.ndarray, problems: int
                     ) -> tuple[np.ndarray, np.ndarray]:
    """Won pairs and pairs of each problem, (P,) each, of solutions with problem ids 0 .. P-1."""
    order = np.argsort(problem, kind="stable")             # one sort, then slices
    starts = np.searchsorted(problem[order], np.arange(1, problems))
    table = [_wins(right[i], score[i]) for i in np.split(order, starts)]
    wins, pairs = np.array(table, dtype=float).T
    return wins, pairs


def _rank_key(score: np.ndarray, classes: Any) -> np.ndarray:
    """(n,) whole numbers that best-of-n sorts by: has an answer, then has a score, then r_s."""
    key = np.unique(np.where(np.isnan(score), -np.inf, score), return_inverse=True)[1]
    if classes is not None:
        key = key + len(key) * (np.asarray(classes) != NO_ANSWER)      # an answer beats any score
    return key


def _subset_count(n: int, k: int) -> int:
    """C(n, k), once it is clear that k of the n solutions can be taken."""
    if not 1 <= k <= n:
        raise ValueError(f"cannot take k = {k} of n = {n} solutions")
    return math.comb(n, k)


@functools.lru_cache(maxsize=64)
def _subsets(n: int, k: int) -> np.ndarray:
    """(S, n) of 0 and 1, a row a subset of size k: all of them, or DRAWS random ones."""
    # Problems share the subsets: their solutions are independent, and so are their errors.
    if _subset_count(n, k) <= EXACT_SUBSETS:
        chosen = np.array(list(itertools.combinations(range(n), k)))
    else:
        # Sorting random numbers shuffles every row; the first k places are a fair subset.
        rng = np.random.default_rng([0, n, k])
        chosen = rng.random((DRAWS, n)).argsort(axis=1)[:, :k]
    subsets = np.zeros((len(chosen), n))
    np.put_along_axis(subsets, chosen, 1.0, axis=1)
    return subsets
