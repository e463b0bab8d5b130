"""
Numbers for the eye: text tables in the terminal, and the pictures of an evaluation.

What is undefined (None) is shown as "-", shares are in per cent, and the error behind a +- is one
standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .metrics import mean_and_stderr, vote_sizes


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, others = row[0].ljust(widths[0]), zip(row[1:], widths[1:])
        lines.append("  ".join([first, *(cell.rjust(width) for cell, width in others)]).rstrip())
    return "\n".join(lines)


def percent(share: float | None, error: float | None = None) -> str:
    """0.7613, 0.0124 -> "76.1 +-1.2"; without an error just "76.1"."""
    if share is None:
        return "-"
    return f"{100 * share:.1f}" + (f" +-{100 * error:.1f}" if error is not None else "")


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals, "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def shorten(text: str, width: int) -> str:
    """The text on one line of at most `width` characters, an ellipsis where it was cut."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


# ---------------------------------------------------------------------------------------------
# an evaluation


def accuracy_table(results: Mapping[str, dict], votes: Mapping[str, dict]) -> str:
    """A line a data set: accuracy and votes of all n solutions; `votes` are metrics.vote_tables."""
    rows = []
    for name, e in results.items():
        # A vote has one expected accuracy a problem, so its error is the plain one over problems.
        last = [mean_and_stderr(votes[name][method][vote_sizes(e["n"])[-1]])
                for method in ("majority_vote", "weighted_vote", "best_of", "pass_at")]
        rows.append([name, str(e["problems"]), str(e["n"]),
                     percent(e["accuracy"], e["accuracy_stderr"]), *(percent(*x) for x in last),
                     decimal(e["mean_response_tokens"], 0), percent(e["finished_share"])])
    return table(("data set", "problems", "n", "accuracy", "majority@n", "weighted@n", "best@n",
                  "pass@n", "tokens", "finished"), rows)


def verification_table(entries: Mapping[str, dict]) -> str:
    """A line a verifier: how well its score tells right solutions from wrong ones.

    F1 is over all solutions, "F1 boxed" over those with an answer; "within" is the AUROC inside
    problems, Spearman the rank correlation with the length, the last two columns mean scores.
    """
    rows = [[name, percent(v["f1"]), percent(v["accuracy_correct"]), percent(v["accuracy_wrong"]),
             percent(v["f1_answered"]), decimal(v["auroc"]), decimal(v["auroc_within"]),
             decimal(v["ece"]), decimal(v["brier"]), decimal(v["spearman_length"], 2),
             decimal(v["mean_r_s_correct"], 2), decimal(v["mean_r_s_wrong"], 2)]
            for name, v in entries.items()]
    return table(("verification", "F1", "on right", "on wrong", "F1 boxed", "AUROC", "within",
                  "ECE", "Brier", "Spearman", "r right", "r wrong"), rows)


def generative_table(entries: Mapping[str, dict]) -> str:
    """A line a data set: the judgements in words, their cost per solution, and r_s's beside it."""
    rows = [[name, percent(g["f1"]), percent(g["accuracy_correct"]), percent(g["accuracy_wrong"]),
             percent(g["undecided"]), decimal(g["tokens"], 1), str(g["self_reward_tokens"]),
             milliseconds(g["seconds"]), milliseconds(g["self_reward_seconds"])]
            for name, g in entries.items()]
    return table(("asked in words", "F1", "on right", "on wrong", "undecided", "tokens",
                  "r_s: tokens", "ms", "r_s: ms"), rows)


def milliseconds(seconds: float | None) -> str:
    """Seconds in milliseconds, "-" for None."""
    return "-" if seconds is None else f"{1000 * seconds:.2f}"


def comparison_table(differences: Mapping[str, Any]) -> str:
    """A line a metric: two runs, their difference and its 95 % interval, a star where it excludes
    zero."""
    rows = []
    for name, d in differences.items():
        if d.a is None and d.b is None:
            continue
        interval, star = "-", ""
        if d.low is not None:
            interval = f"[{d.low:+.4f}, {d.high:+.4f}]"
            star = "*" if d.low > 0 or d.high < 0 else ""
        change = "-" if d.difference is None else f"{d.difference:+.4f}"
        rows.append([name, decimal(d.a, 4), decimal(d.b, 4), change, interval, star])
    return table(("metric", "A", "B", "B - A", "95 % interval", ""), rows)


def pictures(folder: Path, name: str, rows: Sequence[Mapping[str, Any]],
             votes: Mapping[str, Mapping[int, Any]]) -> list[Path]:
    """Draw one data set's four pictures into the folder and return where they lie; none without
    matplotlib."""
    if not plots.available():
        return []
    right = [row["r_v"] for row in rows]
    score = [row["r_s"] for row in rows]
    tokens = [row["response_tokens"] for row in rows]
    path = lambda kind: folder / f"{name.replace('/', '-')}-{kind}.png"  # noqa: E731
    paths = [path("votes")]
    plots.vote_curves(paths[0], votes, f"{name}: accuracy of votes")
    if any(s is not None for s in score):
        # without c_ref there is no r_s, and three pictures would show nothing
        paths += [path("reliability"), path("r_s"), path("length")]
        plots.reliability_diagram(paths[1], right, score, title=f"{name}: reliability of r_s")
        plots.score_histogram(paths[2], right, score, title=f"{name}: r_s, right and wrong")
        plots.score_against_length(paths[3], right, score, tokens, f"{name}: r_s against length")
    return paths
