"""Pictures of a run and of an evaluation, each a function from numbers to a PNG file.

matplotlib is optional and imported only when something is drawn: training and evaluation must not
fail, nor start slower, for want of a picture.  Callers ask `available()` or catch the ValueError.

    curves(path, metrics_rows, eval_rows)            how training went
    reliability_diagram(path, right, score)          does r_s = 0.8 mean right in 80 % of cases?
    score_histogram(path, right, score)              how far apart are right and wrong solutions?
    vote_curves(path, tables)                        what do more samples bring, and weights?
    score_against_length(path, right, score, tokens) does r_s only look at the length?

Every function takes plain lists or arrays in which None means "not there" (a step without a wrong
solution has no r_s_wrong; a solution that was cut off has no score), and never a model.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import ece, mean_and_stderr, reliability

# One meaning a colour in all pictures, and colours that the colour-blind can tell apart (blue and
# orange differ in lightness too, so that a grey print still works).
RIGHT, WRONG, NEUTRAL = "#1f6f9f", "#d9702a", "#5f6670"
MAJORITY, WEIGHTED, BEST_OF, PASS_AT = NEUTRAL, RIGHT, "#8b5fb0", "#b9bec6"
# Background tints of the three phases of training, light enough not to compete with the curves.
PHASES = {"reasoning": "#ffffff", "self-reward": "#f3efe2", "integrated": "#e3eef4"}


def available() -> bool:
    """Whether matplotlib is installed; it is looked for, not imported."""
    return importlib.util.find_spec("matplotlib") is not None


# ---------------------------------------------------------------- how training went


# What each panel of `curves` shows: title, label of the y axis, and per line its key in
# metrics.jsonl, its name in the legend (None: it needs none) and its colour.
_PANELS = (
    ("Accuracy", "share of right solutions", (("reward", "training batch", NEUTRAL),)),
    ("Self-reward r_s", "mean r_s", (("r_s_correct", "right solutions", RIGHT),
                                     ("r_s_wrong", "wrong solutions", WRONG))),
    ("Verification F1", "F1", (("verification_f1", "training batch", NEUTRAL),)),
    ("Response length", "tokens", (("response_tokens", None, NEUTRAL),)),
    ("Entropy", "nats a token", (("entropy", None, NEUTRAL),)),
    ("Self-reward loss", "weighted squared error", (("self_reward_loss", None, NEUTRAL),)),
)


def curves(path: str | Path, metrics_rows: Sequence[Mapping[str, Any]],
           eval_rows: Sequence[Mapping[str, Any]] = (), title: str | None = None) -> None:
    """The course of training in six panels: accuracy, r_s, F1, length, entropy, self-reward loss.

    metrics_rows: the lines of metrics.jsonl.  eval_rows: {step, accuracy, accuracy_stderr,
    verification: {f1}, mean_response_tokens}, held-out results drawn as points over the training
    curves.  The background tells the phase.  Rows may lack keys: a panel without data says so.
    """
    figure = _figure(12.5, 6.6)
    # One step axis for all: what happens at a border of phases is read down the column.
    axes = figure.subplots(2, 3, sharex=True)
    phases = _phase_spans(metrics_rows)
    for axis, (name, label, lines) in zip(axes.flat, _PANELS):
        for start, end, phase in phases:
            axis.axvspan(start, end, color=PHASES.get(phase, "#ffffff"), lw=0, zorder=0)
        for start, _, _ in phases[1:]:
            axis.axvline(start, color="#9aa0a8", lw=0.8, ls=(0, (2, 2)), zorder=1)
        for key, legend, colour in lines:
            _draw_series(axis, metrics_rows, key, legend, colour)
        _dress(axis, name, label)
    _draw_evals(axes.flat[0], eval_rows, ("accuracy",), ("accuracy_stderr",))
    _draw_evals(axes.flat[2], eval_rows, ("verification", "f1"))
    _draw_evals(axes.flat[3], eval_rows, ("mean_response_tokens",))
    axes.flat[1].axhline(0.5, color=NEUTRAL, lw=0.9, ls="--", zorder=1)    # the verdict's border
    for axis in (axes.flat[0], axes.flat[2]):
        # A share: the same scale in every run, so that two pictures can be laid side by side.
        axis.set_ylim(-0.02, 1.02)
    for axis in axes.flat:
        _legend_or_note(axis)
    for axis in axes[1]:
        axis.set_xlabel("step")
    _integer_steps(axes, metrics_rows, eval_rows)
    _phase_legend(figure, phases)
    if title:
        figure.suptitle(title, fontsize=13, x=0.012, ha="left")
    _save(figure, path)


def _phase_spans(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """(start, end, phase) of each stretch of steps in one phase.

    Borders lie half a step before the first step of a phase: a step belongs to one phase whole.
    """
    spans: list[list[Any]] = []
    for row in rows:
        phase = row.get("phase")
        if phase is None or row.get("step") is None:
            continue                                       # an incomplete line says nothing
        if not spans or spans[-1][2] != phase:
            if spans:
                spans[-1][1] = row["step"] - 0.5
            spans.append([row["step"] - 0.5, row["step"] + 0.5, phase])
        spans[-1][1] = row["step"] + 0.5
    return [tuple(span) for span in spans]


def _draw_series(axis: Any, rows: Sequence[Mapping[str, Any]], key: str, legend: str | None,
                 colour: str) -> None:
    """One key of metrics.jsonl: the raw values pale, their moving average on top."""
    # Steps without a value are left out, not drawn as a gap: a batch without a wrong solution has
    # no r_s_wrong, and late in a good run that happens every few steps.
    points = [(row["step"], row[key]) for row in rows
              if row.get("step") is not None and row.get(key) is not None]
    if not points:
        return
    steps, values = np.array(points, dtype=float).T
    # One batch is a few dozen problems: its reward jumps by several points from step to step, and
    # the eye would take that for the course.  A twentieth of the run is smoothed, short runs not.
    width = max(1, len(steps) // 20)
    smooth = _moving_average(values, width)
    if width > 1:
        axis.plot(steps, values, color=colour, lw=0.8, alpha=0.3, zorder=2)
    marker = "o" if len(steps) <= 3 else None              # a line of one point is invisible
    axis.plot(steps, smooth, color=colour, lw=1.8, label=legend, marker=marker, zorder=3)


def _moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over about `width` steps, fewer at both ends; (N,) -> (N,)."""
    # Centred, not trailing: a trailing mean would show every change later than it happened.
    half = width // 2
    return np.array([values[max(0, i - half):i + half + 1].mean() for i in range(len(values))])


def _draw_evals(axis: Any, rows: Sequence[Mapping[str, Any]], key: Sequence[str],
                error_key: Sequence[str] | None = None) -> None:
    """Held-out results as points, with one standard error where it is known."""
    points = [(row.get("step"), _number(_dig(row, key)),
               _number(_dig(row, error_key)) if error_key else math.nan) for row in rows]
    points = [p for p in points if p[0] is not None and math.isfinite(p[1])]
    if not points:
        return
    # Few and exact, against the many noisy batches: points with bars, above the curves.
    steps, values, errors = np.array(points, dtype=float).T
    axis.errorbar(steps, values, yerr=np.nan_to_num(errors), color=RIGHT, marker="o", ms=5,
                  lw=1.2, elinewidth=1.2, capsize=2.5, label="held out", zorder=5)


def _dig(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """row[k1][k2]..., None as soon as one is missing."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _integer_steps(axes: Any, *series: Sequence[Mapping[str, Any]]) -> None:
    """Whole numbers along the step axis, from the first to the last step there is."""
    from matplotlib.ticker import MaxNLocator

    steps = [row["step"] for rows in series for row in rows if row.get("step") is not None]
    axes.flat[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    if steps:
        # A little air, so that the points of the first and last evaluation are not cut in half.
        air = max(0.5, 0.015 * (max(steps) - min(steps)))
        axes.flat[0].set_xlim(min(steps) - air, max(steps) + air)


def _phase_legend(figure: Any, phases: Sequence[tuple[float, float, str]]) -> None:
    """What the tints mean, once for the whole figure; nothing where there is one phase only."""
    from matplotlib.patches import Patch

    # Outside the panels, where no curve can run under it.
    names = list(dict.fromkeys(phase for _, _, phase in phases))
    if len(names) > 1:
        patches = [Patch(facecolor=PHASES.get(name, "#ffffff"), edgecolor="#9aa0a8", lw=0.6,
                         label=name) for name in names]
        figure.legend(handles=patches, loc="outside upper right", ncols=len(names), frameon=False,
                      fontsize=10, title=None)


# ---------------------------------------------------------------- how good r_s is


def reliability_diagram(path: str | Path, right: Any, score: Any, bins: int = 10,
                        title: str | None = None) -> None:
    """Share of right solutions against clipped r_s, bin by bin, and how many each bin holds.

    right, score: (N,).  Points on the diagonal mean that r_s is a probability; bars below show the
    counts, on a log scale since most solutions sit at the ends.
    """
    right, score = _scored(right, score)
    # Empty bins have no point: a zero there would read as "always wrong".
    table = [row for row in reliability(right, score, bins) if row["count"]]
    figure = _figure(5.2, 5.8)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color=NEUTRAL, lw=1, ls="--", label="perfectly calibrated", zorder=1)
    if table:
        x, y = ([row[key] for row in table] for key in ("score", "accuracy"))
        counts = np.array([row["count"] for row in table])
        # The binomial error of a bin: a point far off the diagonal may be three solutions.
        errors = np.sqrt(np.array(y) * (1 - np.array(y)) / counts)
        top.vlines(x, x, y, color=WRONG, lw=2.5, alpha=0.45, zorder=2, label="gap")
        top.errorbar(x, y, yerr=errors, color=RIGHT, marker="o", ms=6, lw=1.5, capsize=2.5,
                     label=f"r_s (ECE {ece(right, score, bins):.3f})", zorder=3)
        # The bars stand at the middle of their bins, the points at the mean score inside them.
        middles = [(row["low"] + row["high"]) / 2 for row in table]
        bars = bottom.bar(middles, counts, width=0.9 / bins, color=RIGHT, alpha=0.75, zorder=2)
        bottom.bar_label(bars, fontsize=7.5, padding=1.5, color=NEUTRAL)
        bottom.set_yscale("log")
        bottom.minorticks_off()
        bottom.set_ylim(0.7, counts.max() * 6)             # room for the numbers on the bars
    _dress(top, title or "Reliability of r_s", "share of right solutions")
    _dress(bottom, None, "solutions")
    top.set_xlim(-0.02, 1.02)
    top.set_ylim(-0.02, 1.02)
    bottom.set_xlabel("r_s, clipped to [0, 1]")
    _legend_or_note(top, bool(table), loc="upper left")
    _save(figure, path)


def score_histogram(path: str | Path, right: Any, score: Any, title: str | None = None) -> None:
    """Distribution of r_s (unclipped) over right and over wrong solutions, each of area one.

    right, score: (N,).  Scaled to the same area, since the two kinds are rarely equally many and
    the question is whether their shapes overlap.
    """
    right, score = _scored(right, score)
    figure = _figure(6.4, 4.0)
    axis = figure.subplots()
    if len(score):
        # A far-off score would squeeze all others into one bar: the outermost half per cent is
        # drawn in the last bar on its side.
        low, high = np.quantile(score, [0.005, 0.995])
        # Never narrower than [0, 1], the range r_s is trained towards.
        low, high = min(low, 0.0), max(high, 1.0)
        edges = np.linspace(low, high, 41)
        for kind, name, colour in ((right, "right", RIGHT), (~right, "wrong", WRONG)):
            if kind.any():
                values = np.clip(score[kind], low, high)
                label = f"{name}: {kind.sum()} solutions, mean {score[kind].mean():.2f}"
                axis.hist(values, edges, density=True, color=colour, alpha=0.5, label=label,
                          zorder=2)
                axis.hist(values, edges, density=True, color=colour, histtype="step", lw=1.4,
                          zorder=3)
        axis.axvline(0.5, color=NEUTRAL, lw=1, ls="--", zorder=4, label="verdict at 0.5")
        axis.set_ylim(0, axis.get_ylim()[1] * 1.28)        # the legend above, not on, the bars
    _dress(axis, title or "r_s of right and wrong solutions", "density")
    axis.set_xlabel("r_s")
    _legend_or_note(axis, bool(len(score)), loc="upper center", ncols=2)
    _save(figure, path)


def score_against_length(path: str | Path, right: Any, score: Any, tokens: Any,
                         title: str | None = None, seed: int = 0) -> None:
    """r_s against the length of the response, one point a solution, with medians by length.

    right, score, tokens: (N,).  A line that falls among the right solutions as well as among the
    wrong ones says that r_s follows the length; two level lines apart say that it does not.
    """
    keep = np.isfinite(_numbers(score))
    right, score = _scored(right, score)
    tokens = _numbers(tokens)[keep]
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    # More points than this are a blob, and a slow one: a random part shows the same.
    shown = np.random.default_rng(seed).permutation(len(score))[:4000]
    # The fewer the points, the larger and the less transparent.
    alpha, size = (0.25, 9) if len(shown) > 500 else (0.6, 20)
    # The line is a median: one r_s of -3 would pull a mean out of the crowd it stands for.
    for kind, name, colour in ((right, "right", RIGHT), (~right, "wrong", WRONG)):
        some = shown[kind[shown]]
        x, y = _medians(tokens[kind], score[kind])
        axis.scatter(tokens[some], score[some], s=size, color=colour, alpha=alpha, lw=0, zorder=2,
                     label=None if len(x) or not len(some) else name)
        if len(x):
            axis.plot(x, y, color="white", lw=4.5, zorder=3)           # a halo against the points
            axis.plot(x, y, color=colour, lw=2.2, marker="o", ms=5, zorder=4,
                      label=f"{name}, median")
    if len(score):
        axis.axhline(0.5, color=NEUTRAL, lw=1, ls="--", zorder=1)
        low, high = np.quantile(score, [0.002, 0.998])
        air = 0.05 * max(high - low, 0.1)
        axis.set_ylim(min(low, 0) - air, max(high, 1) + air)
    if len(tokens) and tokens.min() > 0 and tokens.max() > 20 * tokens.min():
        axis.set_xscale("log")                             # 100 to 8000 tokens: ratios matter
    _dress(axis, title or "r_s against length", "r_s")
    axis.set_xlabel("tokens of the response")
    _legend_or_note(axis, bool(len(score)), loc="best")
    _save(figure, path)


def _medians(x: np.ndarray, y: np.ndarray, groups: int = 8) -> tuple[list[float], list[float]]:
    """Medians of y in groups of equally many points along x, of about 10 or more each."""
    groups = min(groups, len(x) // 10)
    if not groups:
        return [], []
    # Equal x stay together: borders are quantiles, and what lies between two is one group.
    borders = np.unique(np.quantile(x, np.linspace(0, 1, groups + 1)))
    index = np.searchsorted(borders[1:-1], x, side="right")
    chosen = [index == g for g in np.unique(index)]
    return [float(np.median(x[c])) for c in chosen], [float(np.median(y[c])) for c in chosen]


# ---------------------------------------------------------------- what votes bring


def vote_curves(path: str | Path, tables: Mapping[str, Mapping[int, Any]],
                title: str | None = None) -> None:
    """Accuracy of majority, weighted and best-of-k votes against k, with standard errors.

    tables: method -> k -> one expected accuracy a problem (P,), from `metrics.vote_tables`.  The
    errors are over problems; the methods share the problems, so their differences are surer than
    the bars suggest (`metrics.compare` gives intervals for such differences).
    """
    styles = {"majority_vote": ("majority vote", MAJORITY, "s", "-"),
              "weighted_vote": ("weighted by r_s", WEIGHTED, "o", "-"),
              "best_of": ("best of k by r_s", BEST_OF, "^", "-"),
              "pass_at": ("any of k right (pass@k)", PASS_AT, None, ":")}
    figure = _figure(6.4, 4.4)
    axis = figure.subplots()
    drawn = [method for method in styles if tables.get(method)]
    for i, method in enumerate(drawn):
        name, colour, marker, dash = styles[method]
        ks = sorted(tables[method])
        pairs = [mean_and_stderr(tables[method][k]) for k in ks]
        means, errors = (np.array([_number(p[j]) for p in pairs]) for j in (0, 1))
        # On a log axis a factor moves every method by the same little way: bars of equal k would
        # otherwise lie on top of each other.
        x = np.array(ks) * 1.025 ** (i - 1)
        if method == "pass_at":                            # the ceiling, not a contender: no bars
            axis.plot(ks, means, label=name, color=colour, ls=dash, lw=1.7, zorder=2)
            continue
        axis.errorbar(x, means, yerr=np.nan_to_num(errors), label=name, color=colour, ls=dash,
                      marker=marker, ms=5, lw=1.7, elinewidth=1.1, capsize=2.5, zorder=3)
    ks = sorted({k for method in drawn for k in tables[method]})
    if ks:
        # Doubling the samples is the question asked, so each doubling takes the same room.
        axis.set_xscale("log", base=2)
        # The values themselves as labels: "2^3" is how a log axis would write 8.
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
    _dress(axis, title or "Accuracy of votes", "accuracy")
    axis.set_xlabel("solutions k")
    _legend_or_note(axis, bool(ks), loc="best")
    _save(figure, path)


# ---------------------------------------------------------------- the common look, and the file


def _figure(width: float, height: float) -> Any:
    """An empty figure (inches), or ValueError that says how to get matplotlib."""
    try:
        # Figure without pyplot: no window system, no global list of figures that a long run would
        # fill, no settings changed for whoever imports this package.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _dress(axis: Any, title: str | None, label: str) -> None:
    """Title, label, a quiet grid, and no frame on the sides that carry no scale."""
    if title:
        axis.set_title(title, loc="left", fontsize=11.5, pad=7)
    axis.set_ylabel(label, fontsize=9.5)
    axis.grid(True, color="#d5d8dd", lw=0.6, alpha=0.8, zorder=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#9aa0a8")
    axis.tick_params(labelsize=9, color="#9aa0a8")


def _legend_or_note(axis: Any, has_data: bool | None = None, **where: Any) -> None:
    """A legend if a line has a name, or the words "no data": an empty frame would be a riddle."""
    if has_data is None:
        # axhline and axvspan make lines and patches as well; only drawn series have data in x.
        has_data = any(len(line.get_xdata()) and line.get_zorder() >= 2 for line in axis.lines)
    if not has_data:
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", va="center",
                  color=NEUTRAL, fontsize=10, bbox={"color": "white", "pad": 3}, zorder=6)
    elif axis.get_legend_handles_labels()[0]:
        options = {"fontsize": 8.5, "frameon": True, "framealpha": 0.85, "edgecolor": "none"}
        axis.legend(**{**options, "loc": "best", **where})


def _save(figure: Any, path: str | Path) -> None:
    """Write the PNG whole or not at all: drawn in memory, written beside, moved into place.

    (files.write_atomic does the same, but would import torch to draw a picture.)
    """
    # Drawing comes before anything touches the disk: an error in it leaves no trace.
    path = Path(path)
    buffer = io.BytesIO()
    # No version string inside: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system; with the process id,
    # so that two runs cannot write into one temporary file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                  # gone already when all went well


def _number(value: Any) -> float:
    """A float, NaN for None: what matplotlib leaves out of a line."""
    return math.nan if value is None else float(value)


def _numbers(values: Any) -> np.ndarray:
    return np.array([_number(v) for v in np.asarray(values).reshape(-1).tolist()], dtype=float)


def _scored(right: Any, score: Any) -> tuple[np.ndarray, np.ndarray]:
    """(M,) bool and (M,) float of the solutions that have a score."""
    right, score = _numbers(right) > 0.5, _numbers(score)
    if len(right) != len(score):
        raise ValueError(f"{len(right)} truths but {len(score)} scores")
    return right[np.isfinite(score)], score[np.isfinite(score)]
