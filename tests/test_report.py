"""Every picture is drawn from full, thin and empty data, shows the numbers it was given, and is
written whole or not at all; the command that overlays runs."""

import json
import subprocess
import sys

import numpy as np
import pytest

from nanolaser import report
from tests.conftest import ROOT

PNG = b"\x89PNG\r\n\x1a\n"


def steps(count, seed=0):
    """Lines of metrics.jsonl through all three phases, with the gaps that real ones have."""
    rng = np.random.default_rng(seed)
    for step in range(1, count + 1):
        part = min(2, 3 * step // (count + 1))
        yield {"step": step, "phase": ("reasoning", "self-reward", "integrated")[part],
               "reward": rng.random(), "r_s_correct": rng.normal(0.7, 0.1),
               "r_s_wrong": None if step % 7 == 0 else rng.normal(0.3, 0.1),
               "verification_f1": None if step % 7 == 0 else rng.random(),
               "response_tokens": 30 + rng.normal(), "entropy": rng.random(),
               "self_reward_loss": None if part == 0 else rng.random()}


EVALS = [{"step": 0, "accuracy": 0.4, "accuracy_stderr": None, "verification": {"f1": None}},
         {"step": 40, "accuracy": 0.7, "accuracy_stderr": 0.02, "verification": {"f1": 0.7},
          "mean_response_tokens": 31.0}]


def solutions(count, seed=0):
    rng = np.random.default_rng(seed)
    for right in rng.random(count) < 0.6:
        yield {"r_v": float(right), "response_tokens": int(rng.integers(10, 60)),
               "r_s": None if rng.random() < 0.05 else rng.normal(0.4 + 0.3 * right, 0.3)}


def vote_tables(problems, ks=(1, 2, 4, 8)):
    rng = np.random.default_rng(0)
    return {method: {k: rng.random(problems) for k in ks}
            for method in ("majority_vote", "weighted_vote", "best_of", "pass_at")}


RUN = (list(steps(60)), EVALS)
MANY = list(solutions(300))
DRAWINGS = {
    "curves": lambda path: report.curves(path, {"a run": RUN}),
    "curves of seven runs": lambda path: report.curves(
        path, {f"run {i}": (list(steps(50, i)), EVALS) for i in range(7)}),
    "curves, one step": lambda path: report.curves(path, {"a": (list(steps(1)), [])}),
    "curves, only an evaluation": lambda path: report.curves(path, {"a": ([], EVALS[:1])}),
    "curves, nothing": lambda path: report.curves(path, {"a": ([], [])}),
    "curves, plain GRPO": lambda path: report.curves(
        path, {"a": ([{"step": 1, "phase": "reasoning", "reward": 0.5}, {"step": 2}], [])}),
    "before and after": lambda path: report.histograms(path, {"before": MANY, "after": MANY}),
    "before, nothing": lambda path: report.histograms(path, {"before": [], "after": MANY}),
}
for name, rows, votes in (
    ("", MANY, vote_tables(20)),
    (", one solution", [{"r_v": 1.0, "r_s": 0.9, "response_tokens": 12}], vote_tables(1, (1,))),
    (", no r_s", [{"r_v": 1.0, "r_s": None, "response_tokens": 12}] * 2, vote_tables(2)),
    (", no number", [{"r_v": 1.0, "r_s": float("nan"), "response_tokens": 9}], vote_tables(1)),
    (", all alike", [{"r_v": 1.0, "r_s": 1.0, "response_tokens": 20}] * 30, vote_tables(9)),
    (", far off", [{"r_v": 0.0, "r_s": -9.0, "response_tokens": 20}] * 30, vote_tables(9)),
    (", nothing", [], vote_tables(0, ())),
):
    DRAWINGS[f"evaluation{name}"] = (
        lambda path, rows=rows, votes=votes: report.evaluation(path, "math500", rows, votes))


@pytest.mark.filterwarnings("error")  # an empty legend or a bad limit warns
@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_drawn_whole_and_twice_alike(draw, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    assert str(path) in draw(path)
    content = path.read_bytes()
    assert content.startswith(PNG) and content.endswith(b"IEND\xaeB`\x82")
    draw(path)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(function, ...) -> the axes of the picture that it writes."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    kept, write = [], figure.savefig
    monkeypatch.setattr(figure, "savefig",
                        lambda self, *a, **k: (kept.append(self), write(self, *a, **k)))
    return lambda draw, *args: (draw(tmp_path / "x.png", *args), kept[-1].axes)[1]


def line_of(axis, label):
    (line,) = [x for x in axis.lines if x.get_label() == label]
    return line


def test_curves_show_the_numbers(drawn):
    few = list(steps(20))  # too few to be smoothed
    other = list(steps(80, 1))
    accuracy, r_s, *_ = drawn(report.curves, {"few": (few, EVALS), "other": (other, [])})
    line = line_of(accuracy, "few")
    assert line.get_ydata().tolist() == [row["reward"] for row in few]
    # two steps on either side: a mean over five
    smooth = line_of(accuracy, "other").get_ydata()
    assert smooth[10] == pytest.approx(np.mean([row["reward"] for row in other[8:13]]))
    points = [x for x in accuracy.lines if x.get_linestyle() == "None" and len(x.get_xdata())]
    assert [(p.get_xdata().tolist(), p.get_ydata().tolist()) for p in points] == [
        ([0, 40], [0.4, 0.7])]
    # both kinds of solutions of both runs; a step without a wrong solution is left out
    lengths = sorted(len(x.get_xdata()) for x in r_s.lines if x.get_linestyle() == "--"
                     and x.get_alpha() is None)  # fmt: skip
    assert lengths == [18, 69]


def test_borders_of_phases_lie_between_steps(drawn):
    rows = [{"step": s, "phase": "ab"[s > 20], "reward": 0.5} for s in range(10, 50, 10)]
    axes = drawn(report.curves, {"a": (rows, [])})
    borders = [[x.get_xdata()[0] for x in axis.lines if len(set(x.get_xdata())) == 1
                and len(x.get_xdata()) == 2] for axis in axes]  # fmt: skip
    assert borders == [[25.0]] * 6


def test_the_histogram_shows_all_solutions_with_an_r_s(drawn):
    before, after = drawn(report.histograms, {"before": MANY[:9], "after": MANY})
    right = [row["r_s"] for row in MANY if row["r_v"] and row["r_s"] is not None]
    label = after.get_legend_handles_labels()[1][0]
    assert label == f"right: {len(right)}, mean r_s {np.mean(right):.2f}"
    areas = sum(p.get_height() * p.get_width() for p in after.patches)
    assert areas == pytest.approx(2)  # one for the right ones, one for the wrong ones


def test_the_reliability_lies_on_the_diagonal_where_r_s_is_a_probability(drawn):
    rng = np.random.default_rng(0)
    rows = [{"r_v": float(rng.random() < p), "r_s": p, "response_tokens": 9}
            for p in rng.random(20_000)]  # fmt: skip
    axis = drawn(report.evaluation, "x", rows, vote_tables(3))[1]
    line = next(x for x in axis.lines if len(x.get_xdata()) == 10)
    assert np.abs(line.get_xdata() - line.get_ydata()).max() < 0.04


# ---------------------------------------------------------------------------------------------
# the command, and life without matplotlib


def run_folder(path, count, seed):
    path.mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in steps(count, seed))
    (path / "metrics.jsonl").write_text(rows + '{"step": 99, "rew')  # it is being trained
    (path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EVALS))


def command(tmp_path, *arguments):
    """(exit code, stdout, stderr) of python -m nanolaser.report, started in tmp_path."""
    code = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); " \
           "sys.modules.update(matplotlib=None) if sys.argv[1:2] == ['bare'] else 0; " \
           "sys.argv.remove('bare') if 'bare' in sys.argv else 0; " \
           "runpy.run_module('nanolaser.report', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), *arguments], cwd=tmp_path,
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_runs_laid_over_each_other(tmp_path):
    pytest.importorskip("matplotlib")
    for seed, name in enumerate("ab"):
        run_folder(tmp_path / name, 30, seed)
    code, out, err = command(tmp_path, "a", "b", "-o", "both.png")
    assert (code, err) == (0, "") and "both.png" in out
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("arguments, said", [
    (["a", "none"], "none"), (["damaged"], "metrics.jsonl:2"), ([], "runs"),
    (["a", "--outptu", "x"], "--outptu"), (["a", "-o", "no/where/x.png"], "no/where"),
])  # fmt: skip
def test_what_is_no_run_is_one_line(tmp_path, arguments, said):
    pytest.importorskip("matplotlib")
    run_folder(tmp_path / "a", 3, 0)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.jsonl").write_text('{"step": 1}\n5\n{"step": 3}\n')
    code, out, err = command(tmp_path, *arguments)
    (line,) = err.splitlines()
    assert code == 2 and line.startswith("error: ") and said in line
    assert not list(tmp_path.rglob("*.png"))


def test_without_matplotlib_a_line_says_why_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # makes the import fail
    for draw in DRAWINGS.values():
        said = draw(tmp_path / "x.png")
        assert "\n" not in said and "x.png" in said and "pip install matplotlib" in said
    assert not list(tmp_path.iterdir())
    run_folder(tmp_path / "a", 3, 0)
    code, out, err = command(tmp_path, "bare", "a")
    assert code == 1 and "pip install matplotlib" in out + err and "Traceback" not in err


def test_importing_report_does_not_import_matplotlib():
    code = "import sys; from nanolaser import report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------------------------------------
# tables


def test_a_table_is_aligned_and_what_is_undefined_is_a_dash():
    entries = {"r_s": {"f1": 0.5, "auroc": None, "spearman_length": -0.731}, "long name": {}}
    header, first, second = report.verification_table(entries).splitlines()
    assert first.split()[:2] == ["r_s", "50.0"] and second.split() == ["long", "name", *["-"] * 11]
    assert header.index("F1") + 2 == first.index("50.0") + 4  # numbers end where their titles end
    assert "-0.73" in first
