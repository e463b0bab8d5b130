"""Every picture is drawn from full, thin and empty data, shows the numbers it was given, and is
written whole or not at all; a run's page holds its solutions, and hostile ones stay text."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml

import numpy as np
import pytest

from nanolaser import report
from nanolaser.svg import dots, mark, panel, picture
from tests.conftest import ROOT


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
    "curves": lambda: report.curves({"a run": RUN}),
    "curves of seven runs": lambda: report.curves(
        {f"run {i}": (list(steps(50, i)), EVALS) for i in range(7)}),
    "curves, one step": lambda: report.curves({"a": (list(steps(1)), [])}),
    "curves, only an evaluation": lambda: report.curves({"a": ([], EVALS[:1])}),
    "curves, nothing": lambda: report.curves({"a": ([], [])}),
    "curves, all alike": lambda: report.curves(
        {"a": ([{"step": s, "entropy": 1e17} for s in (1, 2)], [])}),
    "curves, plain GRPO": lambda: report.curves(
        {"a": ([{"step": 1, "phase": "reasoning", "reward": 0.5}, {"step": 2}], [])}),
    "before and after": lambda: report.histograms({"before": MANY, "after": MANY}),
    "before, nothing": lambda: report.histograms({"before": [], "after": MANY}),
    "no run": lambda: report.histograms({}),
}  # fmt: skip
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
        lambda rows=rows, votes=votes: report.evaluation("math <500> & more", rows, votes))


def read(svg):
    """The panels of a picture as {title: {"paths": [...], "texts": [...], "box": ...}}, the points
    of the paths in the units of the axes, as the labels of the ticks tell."""
    panels = {}
    for group in xml.fromstring(svg).findall("{*}g"):
        texts = [(float(t.get("x")), float(t.get("y")), t.text, t.get("text-anchor"))
                 for t in group.findall("{*}text") if t.get("transform") is None]  # fmt: skip
        paths = list(group.findall("{*}path"))
        panels[texts[0][2]] = entry = {"texts": [t[2] for t in texts], "lines": []}
        grid = [p for p in paths if "H" in p.get("d")]
        if not grid:
            continue
        # labels right of which a line of the grid begins, and those under the frame
        y_at = {y - 4: float(text) for x, y, text, anchor in texts if anchor == "end"}
        x_at = {x: float(text) for x, y, text, anchor in texts
                if anchor == "middle" and re.fullmatch(r"[-\d.e+]+", text)}  # fmt: skip
        (xa, xb), (ya, yb) = ((min(at), max(at)) for at in (x_at, y_at))
        for path in paths:
            if path in grid:
                continue
            for line in path.get("d").split("M")[1:]:
                points = [(x_at[xa] + (float(x) - xa) / (xb - xa) * (x_at[xb] - x_at[xa]),
                           y_at[ya] + (float(y) - ya) / (yb - ya) * (y_at[yb] - y_at[ya]))
                          for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", line)]  # fmt: skip
                entry["lines"].append((path, points))
    return panels


def lines(panel_of, **wanted):
    """The points of the lines whose path has these attributes (None: has it not)."""
    return [points for path, points in panel_of["lines"] if len(points) > 1 and all(
        path.get(k.replace("_", "-")) == v for k, v in wanted.items())]  # fmt: skip


@pytest.mark.filterwarnings("error")  # numpy warns of the mean of nothing
@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_drawn_within_the_frame_and_twice_alike(draw):
    svg = draw()
    root = xml.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    numbers = [float(x) for path in root.findall(".//{*}path")
               for x in re.findall(r"-?[\d.]+", path.get("d"))]  # fmt: skip
    assert all(0 <= x <= 400 for x in numbers) and "nan" not in svg and "inf" not in svg
    assert width in (0, 400, 800) and height >= 0
    assert draw() == svg


def test_what_is_empty_says_so():
    assert report.curves({"a": ([], [])}).count("no data") == len(report.PANELS)


def test_curves_show_the_numbers():
    few = list(steps(20))  # too few to be smoothed
    other = list(steps(80, 1))
    drawn = read(report.curves({"few": (few, EVALS), "other": (other, [])}))
    (line,) = lines(drawn["Accuracy"], stroke=report.RIGHT, opacity=None)
    assert line == [(pytest.approx(row["step"], abs=0.3), pytest.approx(row["reward"], abs=0.01))
                    for row in few]  # fmt: skip
    # two steps on either side: a mean over five
    (smooth,) = lines(drawn["Accuracy"], stroke=report.WRONG, opacity=None)
    assert smooth[10][1] == pytest.approx(np.mean([row["reward"] for row in other[8:13]]), abs=0.01)
    dots_at = [points[0] for path, points in drawn["Accuracy"]["lines"]
               if len(points) == 1 and path.get("stroke") == report.RIGHT]  # fmt: skip
    assert dots_at == [(pytest.approx(0, abs=0.3), pytest.approx(0.4, abs=0.01)),
                       (pytest.approx(40, abs=0.3), pytest.approx(0.7, abs=0.01))]
    # both kinds of solutions of both runs; a step without a wrong solution is left out
    r_s = next(v for k, v in drawn.items() if k.startswith("Self-reward,"))
    assert sorted(len(x) for x in lines(r_s, stroke_dasharray="5 3")) == [18, 69]
    assert {"few", "other"} <= set(r_s["texts"])  # each line is named at its end


def test_borders_of_phases_lie_between_steps():
    rows = [{"step": s, "phase": "ab"[s > 20], "reward": 0.5, "r_s_correct": 0.1, "r_s_wrong": 0.0,
             "verification_f1": 0.0, "response_tokens": 1, "entropy": s, "self_reward_loss": 0.0}
            for s in range(10, 50, 10)]  # fmt: skip
    for drawn in read(report.curves({"a": (rows, [])})).values():
        borders = [p for _, p in drawn["lines"] if len(p) == 2 and p[0][0] == p[1][0]]
        assert [border[0][0] for border in borders] == [pytest.approx(25, abs=0.2)]


def test_names_at_the_ends_of_lines_lie_apart():
    same = {f"run {i}": ([{"step": s, "reward": 0.01} for s in (1, 2)], []) for i in range(7)}
    group = xml.fromstring(report.curves(same)).find("{*}g")
    places = [float(t.get("y")) for t in group.findall("{*}text") if t.text.startswith("run ")]
    assert len(places) == 7 and max(places) < 240
    assert min(np.diff(sorted(places))) >= 12


def test_the_histogram_shows_all_solutions_with_an_r_s():
    drawn = read(report.histograms({"before": MANY[:9], "after": MANY}))
    title, after = list(drawn.items())[1]
    right = [row["r_s"] for row in MANY if row["r_v"] and row["r_s"] is not None]
    wrong = [row["r_s"] for row in MANY if not row["r_v"] and row["r_s"] is not None]
    assert f"{np.mean(right):.2f}" in title and f"{np.mean(wrong):.2f}" in title
    assert any(f"{len(right)} right and {len(wrong)} wrong" in text for text in after["texts"])
    for colour in (report.RIGHT, report.WRONG):  # each kind has an area of one
        (outline,) = lines(after, stroke=colour)
        x, y = np.array(outline).T
        assert ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() == pytest.approx(1, abs=0.05)


def test_the_reliability_lies_on_the_diagonal_where_r_s_is_a_probability():
    rng = np.random.default_rng(0)
    score = rng.random(20_000)
    drawn = read(picture([report.reliability_panel(rng.random(20_000) < score, score)]))
    (line,) = [x for x in lines(*drawn.values(), stroke=report.RIGHT) if len(x) == 10]
    assert max(abs(x - y) for x, y in line) < 0.05


def test_a_panel_clips_what_lies_outside_and_escapes_what_it_is_told():
    drawn = panel("<b>&", "x", "y", [dots([(5, 99)], "#000"), mark([[(0, 0), (9, -99)]], "#000")],
                  (0, 10), (0, 1))  # fmt: skip
    (entry,) = read(picture([drawn])).values()
    assert entry["texts"][0] == "<b>&"
    assert [y for _, points in entry["lines"] for _, y in points] == pytest.approx([1, 0, 0])


def test_no_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes an import fail
    for draw in DRAWINGS.values():
        assert draw().endswith("</svg>\n")


# ---------------------------------------------------------------------------------------------
# the page of a run, and the command

HOSTILE = ['</script><script>document.title="caught"</script>', "<img src=x onerror=alert(1)>",
           "<!--", "$title ${data} $$", "\u2028 \ud800 \x00 \x1b[31m", "]]>&lt;b&gt;"]  # fmt: skip


def run_folder(path, count=30, seed=0, groups=None, text="1+1=2", summary=True):
    """A run's folder as train.py leaves it; `groups`: of how many steps there are solutions."""
    path.mkdir()
    log = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)  # noqa: E731
    (path / "metrics.jsonl").write_text(log(steps(count, seed)) + '{"step": 99, "rew')  # still on
    (path / "evals.jsonl").write_text(log(EVALS))
    rows = solutions(8 * (count if groups is None else groups))
    (path / "samples.jsonl").write_text(log(
        {"step": 1 + i // 8, "problem": f"problem {i // 8}", "gold": "2", "answer": str(i),
         "response": text if i % 8 else HOSTILE[i // 8 % len(HOSTILE)], "advantage": 0.1 * (i % 8),
         "finished": row["r_s"] is not None, **row} for i, row in enumerate(rows)))  # fmt: skip
    if summary:
        after = {"n": 8, "accuracy": 0.7, "majority_vote": {"8": 0.8}, "verification": {"f1": 0.6}}
        before = after | {"accuracy": 0.4, "verification": {"f1": None}}
        (path / "summary.json").write_text(json.dumps({"before": before, "after": after}))
    return path


class Reader(html.parser.HTMLParser):
    """Which tags a page has, what each script holds, and all text outside of them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.text, self.attributes = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def test_the_page_holds_every_solution_and_nothing_of_them_is_markup(tmp_path):
    folder = run_folder(tmp_path / "a")
    page = Reader(report.page({"<b>a</b>": folder}))
    data, script = page.scripts
    rows = json.loads(data)
    assert [row["response"] for row in rows[::8]] == [HOSTILE[i % 6] for i in range(30)]
    assert {row["answer"] for row in rows} == {str(i) for i in range(240)}
    assert rows[3]["advantage"] == pytest.approx(0.3) and rows[3]["step"] == 1
    assert not {"img", "b"} & set(page.tags) and "<b>a</b>" in page.text
    # before, after and the change of what was measured; "-" for what was not
    assert "accuracy, %40.070.0+30.0" in page.text and "F1, %-60.0-" in page.text
    # nothing is loaded from anywhere
    assert not [v for k, v in page.attributes if k in ("src", "href")]
    assert "import" not in script and "fetch" not in script


def test_the_page_of_a_run_that_has_only_begun_and_of_two(tmp_path):
    folder = run_folder(tmp_path / "a", count=1, groups=0, summary=False)
    (folder / "evals.jsonl").unlink()
    assert json.loads(Reader(report.page({"a": folder})).scripts[0]) == []
    other = run_folder(tmp_path / "b", count=3)
    rows = json.loads(Reader(report.page({"a": folder, "b": other})).scripts[0])
    assert {row["run"] for row in rows} == {"b"} and len(rows) == 24


def test_a_page_stays_small_whatever_was_written(tmp_path):
    # chains of thought of 30,000 characters, each six bytes in JSON: 86 MB of samples
    text = "the beginning" + "\u6570" * 30_000 + "end"
    folder = run_folder(tmp_path / "a", 60, text=text)
    page = report.page({"a": folder})
    assert len(page) < 3_000_000
    rows = json.loads(Reader(page).scripts[0])
    assert len({row["step"] for row in rows}) > 5 and "One step in" in page
    assert rows[1]["response"].startswith("the beginning") and rows[1]["response"].endswith("end")
    (tmp_path / "a" / "samples.jsonl").write_text(json.dumps(
        {"step": 1, "problem": "x" * 3_000_000, "r_v": 0, "r_s": 0.1, "response_tokens": 1}) + "\n")
    assert len(json.loads(Reader(report.page({"a": folder})).scripts[0])) == 1


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
# What a person does, and what the screen then shows, as JSON.
USE = """
<script>
const put = (id, value) => {
  element(id).value = value;
  element("filters").dispatchEvent(new Event("input"));
};
const column = i => [...document.querySelectorAll("#samples tbody tr")]
  .map(line => line.children[i].textContent);
const seen = { all: element("count").textContent, lines: column(0).length };
put("words", "PROBLEM 7"); seen.searched = column(0);
put("words", "onerror"); seen.hostile = element("count").textContent;
document.querySelector("#samples tbody tr").click();
seen.open = document.querySelector("pre + pre").textContent;
put("words", ""); put("from", "3"); put("to", "4"); seen.steps = [...new Set(column(0))];
put("from", ""); put("to", ""); put("which", "wrong"); seen.wrong = [...new Set(column(1))];
put("which", "missed"); seen.missed = column(1).map((x, i) => [x, column(2)[i]]);
put("which", "all"); put("low", "0.5"); put("high", "0.8"); seen.within = column(2);
put("low", ""); put("high", "");
document.querySelectorAll("#samples th")[2].click(); seen.rising = column(2);
document.querySelectorAll("#samples th")[2].click(); seen.falling = column(2);
element("more").click(); seen.more = column(0).length;
seen.title = document.title; seen.images = document.images.length;
document.body.textContent = JSON.stringify(seen);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_the_page_in_a_browser(tmp_path):
    page = report.page({"a": run_folder(tmp_path / "a")})
    (tmp_path / "page.html").write_text(page.replace("</html>", USE + "</html>"), "utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user",
         "--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path}/page.html"],
        capture_output=True, text=True, timeout=120)  # fmt: skip
    seen = json.loads(html.unescape(re.search(r"<body>(.*?)</body>", done.stdout, re.S)[1]))
    assert (seen["title"], seen["images"]) == ("a", 0)  # nothing in a solution was run or drawn
    assert seen["all"] == "240 of 240" and seen["lines"] == 200 and seen["more"] == 240
    assert seen["searched"] == ["8"] * 8 and seen["hostile"] == "5 of 240"
    assert seen["open"] == HOSTILE[1]
    assert seen["steps"] == ["3", "4"] and seen["wrong"] == ["wrong"]
    missed = [(v, float(s)) for v, s in seen["missed"]]
    assert missed and all(s <= 0.505 if v == "right" else s >= 0.495 for v, s in missed)
    assert seen["within"] and all(0.495 <= float(s) <= 0.805 for s in seen["within"])
    for order, sign in (("rising", 1), ("falling", -1)):
        scores = [sign * float(s) for s in seen[order] if s != "-"]
        assert scores == sorted(scores) and len(scores) > 180


def command(tmp_path, *arguments):
    """(exit code, stdout, stderr) of python -m nanolaser.report, started in tmp_path."""
    code = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); " \
           "runpy.run_module('nanolaser.report', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), *arguments], cwd=tmp_path,
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["both.svg", "both.html"])
def test_runs_laid_over_each_other(tmp_path, name):
    for seed, run in enumerate("ab"):
        run_folder(tmp_path / run, 30, seed)
    code, out, err = command(tmp_path, "a", "b", "-o", name)
    assert (code, err) == (0, "") and name in out
    assert (tmp_path / name).read_text("utf-8").count("</svg>") == 1


@pytest.mark.parametrize("arguments, said", [
    (["a", "none"], "none"), (["damaged"], "metrics.jsonl:2"), ([], "runs"),
    (["a", "--outptu", "x"], "--outptu"), (["a", "-o", "no/where/x.svg"], "no/where"),
    (["a", "-o", "x.png"], ".svg"), (["bare"], "samples.jsonl:1"),
])  # fmt: skip
def test_what_is_no_run_is_one_line(tmp_path, arguments, said):
    run_folder(tmp_path / "a", 3)
    run_folder(tmp_path / "bare", 3)
    (tmp_path / "bare" / "samples.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.jsonl").write_text('{"step": 1}\n5\n{"step": 3}\n')
    code, out, err = command(tmp_path, *arguments)
    (line,) = err.splitlines()
    assert code == 2 and line.startswith("error: ") and said in line
    assert not [*tmp_path.rglob("*.svg"), *tmp_path.rglob("*.html"), *tmp_path.rglob("*.png")]


# ---------------------------------------------------------------------------------------------
# tables


def test_a_table_is_aligned_and_what_is_undefined_is_a_dash():
    entries = {"r_s": {"f1": 0.5, "auroc": None, "spearman_length": -0.731}, "long name": {}}
    header, first, second = report.verification_table(entries).splitlines()
    assert first.split()[:2] == ["r_s", "50.0"] and second.split() == ["long", "name", *["-"] * 11]
    assert header.index("F1") + 2 == first.index("50.0") + 4  # numbers end where their titles end
    assert "-0.73" in first
