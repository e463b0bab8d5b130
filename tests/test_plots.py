"""Every picture is drawn from full, thin and empty data, and written whole or not at all."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from nanolaser import plots  # noqa: E402  (after the skip: without matplotlib there is no picture)

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def steps(count):
    """Lines of metrics.jsonl through all three phases, with the gaps that real ones have."""
    rng = np.random.default_rng(0)
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
    right = rng.random(count) < 0.6
    score = [None if rng.random() < 0.05 else rng.normal(0.4 + 0.3 * r, 0.3) for r in right]
    return right.astype(int).tolist(), score, rng.integers(10, 60, size=count).tolist()


def vote_table(problems):
    rng = np.random.default_rng(0)
    return {method: {k: rng.random(problems) for k in (1, 2, 4, 8)}
            for method in ("majority_vote", "weighted_vote", "best_of", "pass_at")}


ONE = ([1], [0.9], [12])
NONE_SCORED = ([1, 0], [None, None], [12, 13])
FLAT = ([1] * 30, [1.0] * 30, [20] * 30)               # all right, all ties

DRAWINGS = {
    "curves": lambda path: plots.curves(path, list(steps(60)), EVALS, title="a run"),
    "curves, one step": lambda path: plots.curves(path, list(steps(1)), []),
    "curves, only an evaluation": lambda path: plots.curves(path, [], EVALS[:1]),
    "curves, nothing": lambda path: plots.curves(path, [], []),
    "curves, plain GRPO": lambda path: plots.curves(
        path, [{"step": 1, "phase": "reasoning", "reward": 0.5}, {"step": 2}]),
    "votes": lambda path: plots.vote_curves(path, vote_table(20)),
    "votes, one problem": lambda path: plots.vote_curves(path, vote_table(1)),
    "votes, k = 1": lambda path: plots.vote_curves(path, {"majority_vote": {1: [1.0, 0.0]}}),
    "votes, nothing": lambda path: plots.vote_curves(path, {"majority_vote": {}}),
}
for name, data in {"": solutions(300), ", one": ONE, ", no score": NONE_SCORED, ", flat": FLAT,
                   ", nothing": ([], [], [])}.items():
    DRAWINGS["reliability" + name] = (
        lambda path, d=data: plots.reliability_diagram(path, *d[:2]))
    DRAWINGS["histogram" + name] = lambda path, d=data: plots.score_histogram(path, *d[:2])
    DRAWINGS["length" + name] = lambda path, d=data: plots.score_against_length(path, *d)


@pytest.mark.filterwarnings("error")                   # an empty legend or a bad limit warns
@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS.keys())
def test_drawn_whole(draw, tmp_path):
    path = tmp_path / "new folder" / "picture.png"
    draw(path)
    content = path.read_bytes()
    assert content.startswith(PNG) and content.endswith(b"IEND\xaeB`\x82")
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


def test_same_numbers_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plots.score_against_length(tmp_path / name, *solutions(100))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        plots.score_histogram(path, *ONE[:2])
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_phase_borders_lie_between_steps():
    spans = plots._phase_spans(list(steps(6)))
    assert spans == [(0.5, 2.5, "reasoning"), (2.5, 4.5, "self-reward"), (4.5, 6.5, "integrated")]
    # metrics every ten steps: the phase lasts until the next one begins
    rows = [{"step": 10, "phase": "a"}, {"step": 20, "phase": "b"}, {"step": 30, "phase": "b"}]
    assert plots._phase_spans(rows) == [(9.5, 19.5, "a"), (19.5, 30.5, "b")]


def test_lengths_that_differ_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="2 truths but 1 scores"):
        plots.score_histogram(tmp_path / "x.png", [1, 0], [0.5])


def test_without_matplotlib_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)    # makes the import fail
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plots.score_histogram(tmp_path / "x.png", *ONE[:2])
    assert not list(tmp_path.iterdir())


def test_importing_plots_does_not_import_matplotlib():
    code = ("import sys; from nanolaser import plots; plots.available();"
            "sys.exit('matplotlib' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
