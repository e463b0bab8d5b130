"""
Numbers for the eye: text tables in the terminal, pictures, and the page that a run leaves behind.

    python -m nanolaser.report runs/a runs/b -o compare.svg     # the curves of two runs, overlaid
    python -m nanolaser.report runs/a -o now.html               # its page, also while it still runs

What is undefined (None) is shown as "-" and left out of curves, shares are in per cent, and the
error behind a +- is one standard error.  Pictures are SVG (svg.py): they need nothing installed.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .cli import main_guard
from .files import NUMBER, finite, read_json, read_jsonl, write_atomic
from .metrics import ece, mean_and_stderr, reliability, vote_sizes
from .svg import DASH, GREY, dots, error_bars, mark, panel, picture


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    # Two passes: a column is as wide as its widest cell, which may come last.
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        others = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *others]).rstrip())
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
    """A line a verifier: how well its score tells right solutions from wrong ones."""
    # F1 is over all solutions, "filtered" over those with an answer; "within" is the AUROC inside
    # problems, Spearman the rank correlation with the length, the last two columns mean scores.  A
    # score that is no probability (a log ratio) has no F1 and no calibration: there stands "-".
    shares = ("f1", "accuracy_correct", "accuracy_wrong", "f1_filtered")
    others = ("auroc", "auroc_within", "ece", "brier", "spearman_length", "mean_r_s_correct",
              "mean_r_s_wrong")
    rows = [[name, *(percent(v.get(k)) for k in shares),
             *(decimal(v.get(k), 3 if i < 4 else 2) for i, k in enumerate(others))]
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
        known = d.low is not None
        interval = f"[{d.low:+.4f}, {d.high:+.4f}]" if known else "-"
        star = "*" if known and not d.low <= 0 <= d.high else ""
        change = "-" if d.difference is None else f"{d.difference:+.4f}"
        rows.append([name, decimal(d.a, 4), decimal(d.b, 4), change, interval, star])
    return table(("metric", "A", "B", "B - A", "95 % interval", ""), rows)


def before_after(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[list[str]]:
    """[name, before, after, change] of two evaluations of the same problems."""
    # In the order in which one asks: does it solve more, what do votes make of that, does it know
    # when it is right?
    n = str(after.get("n"))
    wanted = (
        ("accuracy, %", ("accuracy",)), (f"majority vote of {n}, %", ("majority_vote", n)),
        (f"vote of {n} weighted by r_s, %", ("weighted_vote", n)),
        (f"best of {n} by r_s, %", ("best_of", n)),
        ("verification F1, %", ("verification", "f1")),
        ("AUROC of r_s, %", ("verification", "auroc")),
        ("  within a problem, %", ("verification", "auroc_within")),
        ("mean r_s of right solutions", ("verification", "mean_r_s_correct")),
        ("mean r_s of wrong solutions", ("verification", "mean_r_s_wrong")),
        ("tokens of a solution", ("mean_response_tokens",)),
    )  # fmt: skip
    rows = []
    for name, keys in wanted:
        scale, digits = (100, 1) if "%" in name else (1, 1 if "tokens" in name else 2)
        pair = [x if x is None else scale * x for x in (_at(before, keys), _at(after, keys))]
        change = "-" if None in pair else f"{pair[1] - pair[0]:+.{digits}f}"
        rows.append([name, *(decimal(x, digits) for x in pair), change])
    return rows


def _at(row: Any, keys: Iterable[str]) -> Any:
    """row[k1][k2]..., None where there is none."""
    for key in keys:
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


# ---------------------------------------------------------------------------------------------
# pictures of solutions

# One meaning a colour in all pictures, and colours that the colour-blind can tell apart (blue and
# orange differ in lightness too; and what is wrong is dashed, so that a grey print still works).
RIGHT, WRONG, OTHERS = "#1f6f9f", "#d9702a", ("#8b5fb0", "#3b8f5a", "#818892")
COLOURS = (RIGHT, WRONG, *OTHERS)  # of several runs


def evaluation(title: str, rows: Sequence[Mapping[str, Any]],
               votes: Mapping[str, Mapping[int, Any]]) -> str:
    """One data set in four panels."""
    right, score, tokens = scored(rows)
    return picture([
        votes_panel(votes, f"{title}: accuracy of votes"),  # What do votes bring?
        reliability_panel(right, score),  # Does r_s = 0.8 mean right in 80 % of the cases?
        histogram_panel(right, score, "r_s"),  # How far apart are right and wrong solutions?
        _lengths(right, score, tokens),  # Does r_s only look at the length?
    ])


def histograms(kinds: Mapping[str, Sequence[Mapping[str, Any]]], columns: int = 2) -> str:
    """r_s of right and of wrong solutions, a panel for each of several sets of rollout rows: before
    and after training, say."""
    pairs = {name: scored(rows)[:2] for name, rows in kinds.items()}
    # One scale for all: what training moved is seen, not read.
    high = max([0.0, *(_density(score[kind]).max() for right, score in pairs.values()
                       for kind in (right, ~right))])  # fmt: skip
    return picture([histogram_panel(*pair, name, high) for name, pair in pairs.items()], columns)


def by_phase(steps: Sequence[dict], samples: Sequence[dict]) -> dict[str, list[dict]]:
    """The solutions of a run, sorted by the phase that their step belongs to."""
    phase_of = {row["step"]: row.get("phase", "") for row in steps}
    found = {phase: [] for phase in phase_of.values()}  # in the order in which they come
    for row in samples:
        found.get(phase_of.get(row["step"]), []).append(row)
    return found


def scored(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(right, r_s, tokens), (M,) each, of the solutions that have an r_s."""
    # A solution that was cut off has no end, and no r_s: it is in no picture of r_s.
    kept = [(row["r_v"], row["r_s"], row["response_tokens"]) for row in rows
            if row["r_s"] is not None and math.isfinite(row["r_s"])]
    right, score, tokens = np.array(kept, dtype=float).reshape(-1, 3).T
    return right > 0.5, score, tokens


def votes_panel(votes: Mapping[str, Mapping[int, Any]], title: str = "Accuracy of votes") -> str:
    """Accuracy of each kind of vote against k, with standard errors over problems."""
    # method: name at the end of its line, colour, dashes
    styles = {"majority_vote": ("majority vote", GREY, DASH),
              "weighted_vote": ("weighted by r_s", RIGHT, ""),
              "best_of": ("best by r_s", OTHERS[0], "8 3 2 3"),
              "pass_at": ("any right", OTHERS[2], "2 3")}
    # Doubling the samples is the question asked, so each doubling takes the same room.
    ks, marks = sorted(votes["majority_vote"]), []
    for method, (name, colour, dash) in styles.items():
        pairs = [mean_and_stderr(votes[method][k]) for k in ks]
        seen = [(math.log2(k), *pair) for k, pair in zip(ks, pairs) if pair[0] is not None]
        x, y, error = zip(*seen) if seen else ((), (), ())
        marks.append(mark([list(zip(x, y))], colour, name, stroke_dasharray=dash))
        # The methods share the problems: their differences are surer than these bars suggest.
        if method != "pass_at":
            marks.append(error_bars(x, y, [e or 0 for e in error], colour))
    ticks = {math.log2(k): str(k) for k in ks}
    return panel(title, "solutions k", "accuracy", marks, x_ticks=ticks)


def reliability_panel(right: np.ndarray, score: np.ndarray) -> str:
    """Share of right solutions against clipped r_s, bin by bin; the diagonal is a probability."""
    # Empty bins have no point: a zero there would read as "always wrong".
    bins = [row for row in reliability(right, score) if row["count"]]
    x, y, counts = (np.array([row[k] for row in bins]) for k in ("score", "accuracy", "count"))
    marks, points = [], np.stack((x, y), 1)
    if bins:
        # The binomial error of a bin, and its count: a point far off may be three solutions.
        marks = [mark([[(0, 0), (1, 1)]], GREY, stroke_width=1, stroke_dasharray=DASH),
                 error_bars(x, y, np.sqrt(y * (1 - y) / counts), RIGHT),
                 mark([points], RIGHT), dots(points, RIGHT)]  # fmt: skip
    notes = [(a, b - 0.1, str(n)) for a, b, n in zip(x, y, counts)]
    return panel(f"Reliability (ECE {decimal(ece(right, score))}; solutions in each bin)",
                 "r_s, clipped to [0, 1]", "share of right solutions", marks,
                 (-0.02, 1.08), (-0.02, 1.02), notes=notes)  # fmt: skip


EDGES = np.linspace(-0.5, 1.5, 41)


def _density(score: np.ndarray) -> np.ndarray:
    """The share of scores in each bin, per unit of r_s."""
    # Shares, not counts: right and wrong solutions are rarely equally many, and the question is
    # whether their shapes overlap.  A far-off r_s would squeeze all others into one bar: what lies
    # beyond -0.5 .. 1.5 is drawn in the last bar on its side.
    return np.histogram(np.clip(score, -0.5, 1.5), EDGES)[0] / max(1, len(score)) / 0.05


def histogram_panel(
    right: np.ndarray, score: np.ndarray, title: str, high: float | None = None
) -> str:
    """Distribution of r_s over right and over wrong solutions."""
    marks, means, tall = [], [], 0.1
    for kind, colour, dash in ((right, RIGHT, ""), (~right, WRONG, DASH)):
        density = _density(score[kind])
        means.append(decimal(score[kind].mean() if kind.any() else None, 2))
        tall = max(tall, *density)
        if kind.any():
            # The outline of the bars: each edge twice, at the height on its left and on its right.
            outline = zip(np.repeat(EDGES, 2), [0, *np.repeat(density, 2), 0])
            marks.append(mark([list(outline)], colour, fill=colour, fill_opacity=0.25,
                              stroke_width=1.4, stroke_dasharray=dash))  # fmt: skip
    if marks:  # the verdict's border
        border = [(0.5, -math.inf), (0.5, math.inf)]
        marks.append(mark([border], GREY, stroke_width=1, stroke_dasharray="2 3"))
    title = f"{title}: mean {means[0]} of right, {means[1]} of wrong"
    x_name = f"r_s of {right.sum()} right and {(~right).sum()} wrong (dashed) solutions"
    return panel(title, x_name, "density", marks, (-0.5, 1.5), (0, 1.05 * (high or tall)))


def _lengths(right: np.ndarray, score: np.ndarray, tokens: np.ndarray) -> str:
    """r_s against the length, a point a solution."""
    # Two clouds that both fall say that r_s follows the length, two level ones apart that it does
    # not.  More points than 2,000 are a blob, and a large file: a random part shows the same.
    some = np.random.default_rng(0).permutation(len(score))[:2000]
    some = some[np.isfinite(tokens[some])]  # of solutions sampled elsewhere nobody counted them
    marks = [dots([(tokens[i], score[i]) for i in some if right[i] == kind], colour, 3.5,
                  opacity=0.45, stroke_linecap=cap)
             for kind, colour, cap in ((False, WRONG, "square"), (True, RIGHT, "round"))]
    title = "r_s and length: right dots, wrong squares"
    return panel(title, "tokens of the response", "r_s", marks)


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


def curves(
    runs: Mapping[str, tuple[Sequence[dict], Sequence[dict]]], columns: int = 2
) -> str:
    """The course of training of one or more runs in six panels; name -> (lines of metrics.jsonl,
    lines of evals.jsonl).  Dots are held-out evaluations, grey lines the borders of phases."""
    # 1. Where a phase ends, in the picture of one run; those of several lie in different places.
    borders, phases = [], []
    if len(runs) == 1:
        (steps, _), *_ = runs.values()
        # Between two steps: each belongs to one phase whole.
        for a, b in pairwise([{"step": 0}, *steps]):
            if a.get("phase") != b.get("phase"):
                x = (a["step"] + b["step"]) / 2
                # One below the other: a phase may be too short for its name.
                phases.append((x, 0.28 - 0.12 * len(phases), b.get("phase", "")))
                borders.append([(x, -math.inf), (x, math.inf)])
    # 2. One step axis for all panels: what happens at a border is read down the column.
    last = max([1, *(row["step"] for pair in runs.values() for log in pair for row in log)])
    panels = []
    for title, label, keys, held_out in PANELS:
        marks = []
        for i, (run, (steps, evals)) in enumerate(runs.items()):
            colour = COLOURS[i % len(COLOURS)]
            for key, dash in zip(keys, ("", DASH)):
                name = ("wrong" if dash else "right") if len(keys) > 1 else ""
                name = name if len(runs) == 1 else "" if dash else shorten(run, 18)
                marks += _smooth_line(_points(steps, (key,)), colour, dash, name)
            # Evaluations are few and exact, against the many noisy batches: dots above the curves.
            points = _points(evals, held_out)
            marks += [dots(points, "#fff", 10), dots(points, colour, 7)]
        if any(m["lines"] for m in marks):
            marks.append(mark(borders[1:], "#9aa0a8", stroke_width=0.8))
        share = (-0.02, 1.02) if "F1" in title or "Accuracy" in title else None
        notes = phases if title == "Accuracy" else ()
        panels.append(panel(title, "step", label, marks, (0, last), share, notes=notes))
    return picture(panels, columns)


def _points(rows: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> np.ndarray:
    """(N, 2) of (step, row[k1][k2]...) of the rows that have it; none without keys."""
    # Steps without a value are left out, not drawn as a gap: a batch without a wrong solution has
    # no r_s_wrong, and late in a good run that happens every few steps.
    points = [(row["step"], _at(row, keys)) for row in rows if keys]
    return np.array([p for p in points if p[1] is not None], dtype=float).reshape(-1, 2)


def _smooth_line(points: np.ndarray, colour: str, dash: str, name: str) -> list[dict]:
    """The values pale, their moving average on top; no mark where there is nothing to draw."""
    if not len(points):
        return []
    steps, values = points.T
    # One batch is a few dozen problems: its reward jumps by several points from step to step, and
    # the eye would take that for the course.  A twentieth of the run is smoothed, short runs not.
    # Centred, not trailing: a trailing mean would show every change later than it happened.
    half = len(steps) // 40
    # More points than pixels are nothing but bytes.
    shown = range(len(steps) - 1, -1, -(1 + len(steps) // 1000))[::-1]
    smooth = [(steps[i], values[max(0, i - half) : i + half + 1].mean()) for i in shown]
    pale = mark([points[shown]], colour, stroke_width=0.7, opacity=0.35)
    line = mark([smooth], colour, name, stroke_dasharray=dash)
    return [pale, line] if half else [line]


def save(path: str | Path, svg: str) -> str:
    """Write a picture or page, whole or not at all; the line to tell."""
    write_atomic(path, svg)
    return f"picture {path}"


# ---------------------------------------------------------------------------------------------
# the page of a run

PAGE_BYTES = 2_500_000  # of samples: a page that opens at once, and can be sent to somebody
LONGEST = 8_000  # characters of a solution that are shown


def page(folders: Mapping[str, Path]) -> str:
    """One HTML file about one or more runs: before and after, curves, and the sampled solutions, to
    sort, filter and search.  All of it is inside; it asks no network for anything."""
    logs = {name: read_run(folder) for name, folder in folders.items()}
    # 1. Before and after, of runs that have come to their end.
    tables = []
    for name, folder in folders.items():
        if (folder / "summary.json").is_file():
            summary = read_json(folder / "summary.json")
            cells = [[name, "before", "after", "change"],
                     *before_after(summary.get("before"), summary.get("after") or {})]
            cells = ["".join(f"<td>{html.escape(x)}</td>" for x in row) for row in cells]
            tables.append(f"<table><tr>{'</tr><tr>'.join(cells)}</tr></table>")
    # 2. The curves; of one run also how r_s parted right from wrong, phase after phase.
    pictures = [curves({name: log[:2] for name, log in logs.items()}, 3)]
    if len(logs) == 1:
        ((steps, _, samples),) = logs.values()
        pictures.append(histograms(by_phase(steps, samples), 3))
    # 3. The solutions.  One pass over the template, so that nothing that was put in is looked at
    #    again: a solution may say $title.
    data, note = _samples_json({name: log[2] for name, log in logs.items()})
    template = string.Template((Path(__file__).parent / "report.html").read_text("utf-8"))
    return template.substitute(title=html.escape(", ".join(logs)), tables="".join(tables),
                               pictures="".join(pictures), data=data, note=note)  # fmt: skip


def _samples_json(runs: Mapping[str, Sequence[dict]]) -> tuple[str, str]:
    """(the solutions as JSON for the page, a sentence on what is not among them)."""
    by_step: dict[tuple, list[str]] = {}
    for name, rows in runs.items():
        for row in rows:
            # What a model writes is anything, HTML and scripts included.  In JSON no tag can begin,
            # once "<" is written as its number; the page's script shows it as text (report.html).
            line = json.dumps({"run": name} | finite(row)).replace("<", "\\u003c")
            by_step.setdefault((name, row["step"]), []).append(line)
    # A long run has more solutions than a page can hold: every second step, every third ...
    sizes, every = [sum(map(len, lines)) for lines in by_step.values()], 1
    while sum(sizes[::every]) > PAGE_BYTES and every < len(sizes):
        every += 1
    shown = [line for lines in list(by_step.values())[::every] for line in lines]
    note = "" if every == 1 else f"One step in {every} is here, all are in samples.jsonl."
    return "[" + ",\n".join(shown) + "]", note


def read_run(folder: str | Path) -> tuple[list[dict], list[dict], list[dict]]:
    """(metrics.jsonl, evals.jsonl, what is shown of samples.jsonl) of a run's folder; ValueError,
    one line, if it is none."""
    logs = [Path(folder) / f"{name}.jsonl" for name in ("metrics", "evals", "samples")]
    if not logs[0].is_file():
        raise ValueError(f"{folder} is no training run: there is no metrics.jsonl in it")
    solution = {"r_v": NUMBER, "r_s": (*NUMBER, type(None)), "response_tokens": int}
    # `cut`: a run that is being trained, or was killed, may end within a line.
    metrics, evals, samples = (
        (row for _, row in read_jsonl(log, {"step": int, **more}, cut=True)) if log.exists() else ()
        for log, more in zip(logs, ({}, {}, solution))
    )
    return list(metrics), list(evals), [_shown(row) for row in samples]


def _shown(row: Mapping[str, Any]) -> dict:
    """What a page shows of a solution: of a long chain of thought its beginning and its end."""
    # What the page has a place for, and no other keys of samples.jsonl.
    keys = "step problem gold response answer r_v r_s advantage response_tokens finished".split()
    row = {key: row.get(key) for key in keys}
    text = str(row["response"])
    if len(text) > LONGEST:
        left_out = f"\n[... {len(text) - LONGEST} characters ...]\n"
        row["response"] = text[: LONGEST // 2] + left_out + text[-LONGEST // 2 :]
    return row


def main() -> None:
    """The curves of several runs in one picture, or one page about them."""
    parser = argparse.ArgumentParser(description="show training runs: their curves laid over each "
                                     "other (.svg), or a page with their samples (.html)")
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("-o", "--output", default="compare.html", help="(default: compare.html)")
    # One line, as from the other scripts, where argparse would print its usage as well.
    parser.error = lambda text: sys.exit(print(f"error: {text}", file=sys.stderr) or 2)
    given = parser.parse_args()
    folders, kind = {str(Path(run)): Path(run) for run in given.runs}, Path(given.output).suffix
    if kind not in (".html", ".svg"):
        parser.error(f"--output {given.output}: its name must end in .html or .svg")
    logs = {name: read_run(folder)[:2] for name, folder in folders.items()}
    print(save(given.output, page(folders) if kind == ".html" else curves(logs)))


if __name__ == "__main__":
    main_guard(main)
