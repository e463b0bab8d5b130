"""
Numbers for the eye: text tables in the terminal, and pictures.

    python -m nanolaser.report runs/a runs/b -o compare.png     # the curves of two runs, overlaid

What is undefined (None) is shown as "-" and left out of curves, shares are in per cent, and the
error behind a +- is one standard error.

matplotlib is optional, and imported only when something is drawn: neither training nor evaluation
may fail, or start slower, for want of a picture.  So every function that draws returns the one
line to tell the user: where the picture is, or why there is none.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cli import main_guard
from .files import read_jsonl, write_atomic
from .metrics import ece, mean_and_stderr, reliability, vote_sizes


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    # Two passes: a column is as wide as its widest cell, which may come last.
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
# tables of an evaluation


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

    F1 is over all solutions, "filtered" over those with an answer; "within" is the AUROC inside
    problems, Spearman the rank correlation with the length, the last two columns mean scores.
    """
    # A score that is no probability (a log ratio) has no F1 and no calibration: its columns are "-"
    rows = [[name, *(percent(v.get(k)) for k in ("f1", "accuracy_correct", "accuracy_wrong",
                                                 "f1_filtered")),
             *(decimal(v.get(k)) for k in ("auroc", "auroc_within", "ece", "brier")),
             *(decimal(v.get(k), 2) for k in ("spearman_length", "mean_r_s_correct",
                                              "mean_r_s_wrong"))]
            for name, v in entries.items()]
    return table(("verification", "F1", "on right", "on wrong", "filtered", "AUROC", "within",
                  "ECE", "Brier", "Spearman", "r right", "r wrong"), rows)


def comparison_table(differences: Mapping[str, Any]) -> str:
    """A line a metric: two runs, their difference and its 95 % interval, a star where it excludes
    zero."""
    rows = []
    for name, d in differences.items():
        if d.a is None and d.b is None:
            continue
        # An interval that holds zero is no difference, however large the number before it.
        interval, star = "-", ""
        if d.low is not None:
            interval = f"[{d.low:+.4f}, {d.high:+.4f}]"
            star = "*" if d.low > 0 or d.high < 0 else ""
        change = "-" if d.difference is None else f"{d.difference:+.4f}"
        rows.append([name, decimal(d.a, 4), decimal(d.b, 4), change, interval, star])
    return table(("metric", "A", "B", "B - A", "95 % interval", ""), rows)


# ---------------------------------------------------------------------------------------------
# pictures of an evaluation

# One meaning a colour in all pictures, and colours that the colour-blind can tell apart (blue and
# orange differ in lightness too, so that a grey print still works).
RIGHT, WRONG, NEUTRAL, OTHERS = "#1f6f9f", "#d9702a", "#5f6670", ("#8b5fb0", "#3b8f5a", "#b9bec6")


def evaluation(path: str | Path, title: str, rows: Sequence[Mapping[str, Any]],
               votes: Mapping[str, Mapping[int, Any]]) -> str:
    """One data set in four panels: what votes bring, whether r_s = 0.8 means right in 80 % of the
    cases, how far apart right and wrong solutions are, and whether r_s only looks at the length."""
    def paint(figure: Any) -> None:
        (a, b), (c, d) = figure.subplots(2, 2)
        _votes(a, votes)
        _reliability(b, *_scored(rows)[:2])
        _histogram(c, *_scored(rows)[:2])
        _lengths(d, *_scored(rows))
        figure.suptitle(title, fontsize=13, x=0.012, ha="left")

    return _draw(path, 11, 8, paint)


def histograms(path: str | Path, kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """r_s of right and of wrong solutions, a panel for each of several sets of rollout rows: before
    and after training, say."""
    def paint(figure: Any) -> None:
        # One scale for all of them: what training moved is seen, not read.
        axes = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (name, rows) in zip(axes, kinds.items()):
            _histogram(axis, *_scored(rows)[:2], title=name)

    return _draw(path, 5.5 * len(kinds), 3.6, paint)


def _scored(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(right, r_s, tokens), (M,) each, of the solutions that have an r_s."""
    # A solution that was cut off has no end, and no r_s: it is in no picture of r_s.
    kept = [row for row in rows if row["r_s"] is not None and math.isfinite(row["r_s"])]
    right, score, tokens = (np.array([row[k] for row in kept], dtype=float)
                            for k in ("r_v", "r_s", "response_tokens"))
    return right > 0.5, score, tokens


def _votes(axis: Any, votes: Mapping[str, Mapping[int, Any]]) -> None:
    """Accuracy of each kind of vote against k, with standard errors over problems."""
    styles = {"majority_vote": ("majority vote", NEUTRAL, "s-"),
              "weighted_vote": ("weighted by r_s", RIGHT, "o-"),
              "best_of": ("best of k by r_s", OTHERS[0], "^-"),
              "pass_at": ("any of k right (pass@k)", OTHERS[2], ":")}
    ks = sorted(votes["majority_vote"])
    for method, (name, colour, style) in styles.items():
        pairs = [mean_and_stderr(votes[method][k]) for k in ks]
        means, errors = ([math.nan if p[j] is None else p[j] for p in pairs] for j in (0, 1))
        # The methods share the problems: their differences are surer than these bars suggest.
        bars = None if method == "pass_at" else np.nan_to_num(errors)
        axis.errorbar(ks, means, yerr=bars, fmt=style, color=colour, label=name, ms=5, capsize=2.5)
    if ks:
        # Doubling the samples is the question asked, so each doubling takes the same room; the
        # values themselves as labels, since "2^3" is how a log axis would write 8.
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
    _dress(axis, "Accuracy of votes", "solutions k", "accuracy", bool(ks))


def _reliability(axis: Any, right: np.ndarray, score: np.ndarray) -> None:
    """Share of right solutions against clipped r_s, bin by bin; the diagonal is a probability."""
    # Empty bins have no point: a zero there would read as "always wrong".
    bins = [row for row in reliability(right, score) if row["count"]]
    x, y, counts = (np.array([row[k] for row in bins]) for k in ("score", "accuracy", "count"))
    axis.plot([0, 1], [0, 1], "--", color=NEUTRAL, lw=1)
    if bins:
        # The binomial error of a bin, and its count: a point far off may be three solutions.
        axis.errorbar(x, y, yerr=np.sqrt(y * (1 - y) / counts), fmt="o-", color=RIGHT, capsize=2.5,
                      label=f"r_s (ECE {ece(right, score):.3f}); solutions in each bin")
        for place in zip(x, y, counts):
            axis.annotate(str(place[2]), place[:2], xytext=(5, -11), textcoords="offset points",
                          fontsize=7.5, color=NEUTRAL)
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    _dress(axis, "Reliability", "r_s, clipped to [0, 1]", "share of right solutions", bool(bins))


def _histogram(axis: Any, right: np.ndarray, score: np.ndarray, title: str | None = None) -> None:
    """Distribution of r_s over right and over wrong solutions, each of area one: the two kinds are
    rarely equally many, and the question is whether their shapes overlap."""
    for kind, name, colour in ((right, "right", RIGHT), (~right, "wrong", WRONG)):
        if kind.any():
            # A far-off r_s would squeeze all others into one bar: what lies beyond is drawn in the
            # last bar on its side.
            values = np.clip(score[kind], -0.5, 1.5)
            label = f"{name}: {kind.sum()}, mean r_s {score[kind].mean():.2f}"
            axis.hist(values, np.linspace(-0.5, 1.5, 41), density=True, color=colour, alpha=0.5,
                      label=label)
    axis.axvline(0.5, color=NEUTRAL, lw=1, ls="--")  # the verdict's border
    _dress(axis, title or "Right and wrong solutions", "r_s", "density", bool(len(score)))


def _lengths(axis: Any, right: np.ndarray, score: np.ndarray, tokens: np.ndarray) -> None:
    """r_s against the length, a point a solution: two clouds that both fall say that r_s follows
    the length, two level ones apart that it does not."""
    # More points than this are a blob, and a slow one: a random part shows the same.
    shown = np.random.default_rng(0).permutation(len(score))[:4000]
    for kind, name, colour in ((right, "right", RIGHT), (~right, "wrong", WRONG)):
        some = shown[kind[shown]]
        axis.scatter(tokens[some], score[some], s=9, color=colour, alpha=0.3, lw=0, label=name)
    _dress(axis, "r_s and length", "tokens of the response", "r_s", bool(len(score)))


# ---------------------------------------------------------------------------------------------
# pictures of training

# What each panel shows: title, label of the y axis, keys in metrics.jsonl (the second is dashed),
# and where the same number is found in a held-out evaluation.
PANELS = (
    ("Accuracy", "share of right solutions", ("reward",), ("accuracy",)),
    ("Self-reward, right and wrong (dashed)", "mean r_s", ("r_s_correct", "r_s_wrong"), ()),
    ("Verification F1", "F1", ("verification_f1",), ("verification", "f1")),
    ("Response length", "tokens", ("response_tokens",), ("mean_response_tokens",)),
    ("Entropy", "nats a token", ("entropy",), ()),
    ("Self-reward loss", "weighted squared error", ("self_reward_loss",), ()),
)
COLOURS = (RIGHT, WRONG, *OTHERS)  # of several runs


def curves(path: str | Path, runs: Mapping[str, tuple[Sequence[dict], Sequence[dict]]]) -> str:
    """The course of training of one or more runs in six panels; name -> (lines of metrics.jsonl,
    lines of evals.jsonl).  Points are held-out evaluations, grey lines the borders of phases."""
    def paint(figure: Any) -> None:
        """Fill the figure."""
        # One step axis for all: what happens at a border of phases is read down the column.
        axes = figure.subplots(2, 3, sharex=True)
        for axis, (title, label, keys, held_out) in zip(axes.flat, PANELS):
            drawn = False
            for i, (name, (steps, evals)) in enumerate(runs.items()):
                colour = COLOURS[i % len(COLOURS)]
                for key, dash in zip(keys, ("-", "--")):
                    drawn |= _smooth_line(axis, _points(steps, (key,)), colour, dash, name)
                # Few and exact, against the many noisy batches: points above the curves.
                points = _points(evals, held_out)
                axis.plot(*points.T, "o", color=colour, mec="white", ms=6, zorder=5)
                drawn |= len(points) > 0
                for before, after in zip(steps, steps[1:]):
                    if before.get("phase") != after.get("phase") and len(runs) == 1:
                        # Between the steps: each belongs to one phase whole.
                        border = (before["step"] + after["step"]) / 2
                        axis.axvline(border, color="#9aa0a8", lw=0.8, zorder=1)
            if "F1" in title or "Accuracy" in title:
                axis.set_ylim(-0.02, 1.02)  # a share: the same scale in every picture
            _dress(axis, title, "step", label, drawn)

    return _draw(path, 12.5, 6.6, paint)


def _points(rows: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> np.ndarray:
    """(N, 2) of (step, row[k1][k2]...) of the rows that have it."""
    # Steps without a value are left out, not drawn as a gap: a batch without a wrong solution has
    # no r_s_wrong, and late in a good run that happens every few steps.
    points, keys = [], tuple(keys)
    for row in rows:
        value: Any = row if keys else None
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            points.append((row["step"], value))
    return np.array(points, dtype=float).reshape(-1, 2)


def _smooth_line(axis: Any, points: np.ndarray, colour: str, dash: str, name: str) -> bool:
    """The values pale, their moving average on top; whether there was anything to draw."""
    if not len(points):
        return False
    steps, values = points.T
    # One batch is a few dozen problems: its reward jumps by several points from step to step, and
    # the eye would take that for the course.  A twentieth of the run is smoothed, short runs not.
    # Centred, not trailing: a trailing mean would show every change later than it happened.
    half = len(steps) // 40
    smooth = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    if half:
        axis.plot(steps, values, dash, color=colour, lw=0.8, alpha=0.3)
    marker = "o" if len(steps) <= 3 else None  # a line of one point is invisible
    axis.plot(steps, smooth, dash, color=colour, lw=1.8, marker=marker,
              label=name if dash == "-" else None)
    return True


# ---------------------------------------------------------------------------------------------
# the common look, and the file


def _dress(axis: Any, title: str, x: str, y: str, drawn: bool) -> None:
    """Title, labels, a quiet grid, and a legend or the words "no data": an empty frame would be a
    riddle."""
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel(x, fontsize=9.5)
    axis.set_ylabel(y, fontsize=9.5)
    axis.grid(True, color="#d5d8dd", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)  # they carry no scale
    if not drawn:
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color=NEUTRAL)
    elif axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8.5, framealpha=0.85, edgecolor="none", loc="best")


def _draw(path: str | Path, width: float, height: float, paint: Callable[[Any], None]) -> str:
    """Let `paint` fill an empty figure (inches) and write it, whole or not at all; the line to
    tell."""
    try:
        # Figure without pyplot: no window system, no global list of figures that a long run would
        # fill, no settings changed for whoever imports this package.
        from matplotlib.figure import Figure
    except ImportError:
        return f"no picture {Path(path).name}: matplotlib is missing (pip install matplotlib)"
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    paint(figure)
    # Drawn in memory: an error in the drawing leaves no trace on the disk.  No version string
    # inside: the same numbers give the same bytes.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
    return f"picture {path}"


def read_run(folder: str) -> tuple[list[dict], list[dict]]:
    """(metrics.jsonl, evals.jsonl) of a run's folder; ValueError, one line, if it is none."""
    metrics, evals = (Path(folder) / name for name in ("metrics.jsonl", "evals.jsonl"))
    if not metrics.is_file():
        raise ValueError(f"{folder} is no training run: there is no metrics.jsonl in it")
    # `cut`: a run that is being trained, or was killed, may end within a line.
    return tuple([row for _, row in read_jsonl(log, {"step": int}, cut=True)] if log.exists()
                 else [] for log in (metrics, evals))


def main() -> None:
    """The curves of several runs in one picture."""
    parser = argparse.ArgumentParser(description="lay the curves of training runs over each other")
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("-o", "--output", default="compare.png", help="(default: compare.png)")
    parser.error = lambda text: sys.exit(print(f"error: {text}", file=sys.stderr) or 2)
    given = parser.parse_args()
    said = curves(given.output, {str(Path(run)): read_run(run) for run in given.runs})
    print(said)
    if said.startswith("no picture"):
        sys.exit(1)


if __name__ == "__main__":
    main_guard(main)
