"""benchmarks/easy_to_check.py: what solutions cost and bring, and a page that is its numbers'."""

import json

import pytest

from benchmarks.easy_to_check import equal_accuracy, page, picture, spending
from tests.conftest import ROOT


def row(problem, sample, right, r_s):
    return {"prompt_id": problem, "sample": sample, "problem": f"{problem}?", "r_v": float(right),
            "r_s": r_s, "answer": "a,b" if right else f"a,{'cdef'[sample]}", "finished": True,
            "response_tokens": 9}  # fmt: skip


def test_what_each_way_of_spending_costs_and_brings():
    """One problem with one right solution of four, which alone is believed."""
    rows = [row(0, i, i == 2, 0.9 if i == 2 else 0.1 * i) for i in range(4)]
    curves = spending(rows)
    # four answers, each given once: every one of them wins as often as the others
    assert curves["majority"] == [[9, pytest.approx(0.25)], [18, pytest.approx(0.25)],
                                  [36, pytest.approx(0.25)]]
    assert curves["best"] == [[10, 0.25], [20, 0.5], [40, 1.0]]
    assert [y for _, y in curves["any"]] == [0.25, 0.5, 1.0]
    (t1, y1), (t2, y2), (t4, y4) = curves["stopping"]
    # with all four it is found after 1, 2, 3 or 4 solutions of ten tokens; with two after 1 or 2,
    # if it is among them.  The orders are drawn: 0.25 +- 0.06.
    assert t1 == 10 and y1 == pytest.approx(0.25, abs=0.2) and y2 == pytest.approx(0.5, abs=0.2)
    assert y4 == 1.0 and 15 < t2 < 20 and 20 < t4 < 30


def test_where_nothing_is_believed_all_is_drawn_and_the_highest_r_s_wins():
    rows = [row(0, i, i == 3, 0.1 * i) for i in range(4)]
    assert spending(rows)["stopping"][-1] == [40, 1.0]


def test_tokens_at_equal_accuracy():
    curves = {"majority": [[50, 0.2], [1600, 0.4]],
              "stopping": [[50, 0.2], [100, 0.4], [200, 0.6]]}  # fmt: skip
    assert equal_accuracy(curves) == (0.4, 1600, pytest.approx(100))


def test_the_page_and_the_picture_are_those_of_the_numbers():
    found = json.loads((ROOT / "docs" / "easy-to-check.json").read_text())
    assert (ROOT / "docs" / "easy-to-check.md").read_text() == page(found)
    assert (ROOT / "docs" / "pictures" / "second.svg").read_text() == picture(found)


@pytest.mark.slow
def test_the_whole_in_miniature(call, tmp_path):
    small = ["--runs", tmp_path / "runs", "--docs", tmp_path, "--steps", 9, "--problems", 4,
             "--seeds", "0,1", "--draws", 20]  # fmt: skip
    code, out, err = call("benchmarks/easy_to_check.py", *small)
    assert code == 0, err
    text = (tmp_path / "easy-to-check.md").read_text()
    assert text in out and "best of k by r_s" in text
    (tmp_path / "easy-to-check.md").unlink()
    assert call("benchmarks/easy_to_check.py", *small, "--report")[0] == 0
    assert (tmp_path / "easy-to-check.md").read_text() == text
    assert (tmp_path / "pictures" / "second.svg").stat().st_size > 2000
