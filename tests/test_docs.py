"""The pages hold: the walkthrough's numbers come out again, links lead somewhere, and commands name
scripts and options that there are."""

import json
import re
import subprocess
import sys

import pytest

from docs import walkthrough
from tests.conftest import ROOT
from tests.test_report import run_folder

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def alike(a, b):
    """Whether two texts are the same, but for the last digit of a number that has decimals: where
    the next digit is near 5, another machine's rounding may decide otherwise."""
    x, y = NUMBER.findall(a), NUMBER.findall(b)
    if NUMBER.sub("#", a).split() != NUMBER.sub("#", b).split():
        return False
    unit = lambda number: 1.01 * 10.0 ** -len(number.partition(".")[2])  # noqa: E731
    return len(x) == len(y) and all(
        p == q or ("." in p and abs(float(p) - float(q)) <= unit(p)) for p, q in zip(x, y))


def test_the_walkthrough_comes_out_again():
    done = subprocess.run([sys.executable, ROOT / "docs" / "walkthrough.py"], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = walkthrough.sections(done.stdout)
    page = walkthrough.BLOCK.findall((ROOT / "docs" / "walkthrough.md").read_text("utf-8"))
    assert len(printed) > 5 and len(printed) == len(page)
    for ours, theirs in zip(printed, page):
        assert alike(ours, theirs), f"{ours}\n\nthe page:\n\n{theirs}"


def test_what_counts_as_alike():
    assert alike("a  0.25 3", "a 0.26  3") and not alike("a 0.25 3", "a 0.27 3")
    assert not alike("a 3", "a 4") and not alike("a 3", "b 3") and not alike("-0.12", "0.12")


def test_the_four_diffs_are_the_lines_of_the_code():
    code = [line.split("  #")[0].strip() for line in (ROOT / "tests" / "plain.py").open()]
    page = (ROOT / "docs" / "walkthrough.md").read_text("utf-8")
    diffs = re.findall(r"```diff\n(.*?)```", page, re.S)
    assert len(diffs) == 4
    for diff in diffs:
        place = 0
        for line in diff.splitlines():
            text = line[1:].split("  #")[0].strip()
            if line[0] == "-" or text == "...":
                continue
            place = code.index(text, place) + 1  # ValueError: not there, or not in this order


def test_the_pictures_of_a_run(tmp_path):
    run = run_folder(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    (tmp_path / "samples.jsonl").write_text("".join(
        json.dumps(row | {"prompt_id": i // 8}) + "\n" for i, row in enumerate(rows)))
    walkthrough.pictures(run, tmp_path, tmp_path)
    drawn = [path.read_text() for path in tmp_path.glob("*.svg")]
    assert len(drawn) == 3 and not [svg for svg in drawn if "no data" in svg]


# ---------------------------------------------------------------------------------------------
# links and commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        if heading:
            # as the pages are shown: lower case, no punctuation, a hyphen for each space
            names = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
            assert heading in [re.sub(r"[^\w -]", "", n).lower().replace(" ", "-") for n in names]


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    assert not [p.name for p in PAGES if p.name != "README.md" and f"({p.name}" not in index]


# python script.py ... or python -m module ..., alone in a line or between backticks
COMMAND = re.compile(r"(?:\bpython|\btorchrun [^`\n]*?) (-m [\w.]+|[\w./]+\.py\b)([^`#]*)")


def commands():
    """(page, what is run, its options) of every command in the pages."""
    for page in PAGES:
        text = page.read_text("utf-8")
        blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
        spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        for line in [*"".join(blocks).splitlines(), *(span.replace("\n", " ") for span in spans)]:
            for what, rest in COMMAND.findall(line):
                if what not in ("-m pytest", "-m venv", "benchmarks/NAME.py"):
                    yield page.name, what, tuple(re.findall(r"(?<!\S)--[a-z][\w-]*", rest))


def test_commands_name_scripts_and_options_that_there_are(call):
    found = sorted(set(commands()))
    assert len({what for _, what, _ in found}) > 8
    for page, what, options in found:
        path = what.removeprefix("-m ")
        path = path if what == path else path.replace(".", "/") + ".py"
        path = path if (ROOT / path).exists() else path.replace(".py", "/__main__.py")
        text = (ROOT / path).read_text("utf-8")  # there is no such file
        if options and path not in ("train.py", "sample.py", "verify.py", "evaluate.py"):
            # a benchmark or a module: its options stand in its text, as strings or as fields
            known = lambda o: o in text or o[2:].replace("-", "_") in text  # noqa: E731
        elif options:
            shown = call(path, "--help")[1]
            known = lambda o: re.search(rf"{o}\b(?!-)", shown)  # noqa: E731
        assert not [o for o in options if not known(o)], (page, what, options)


def test_options_that_are_spoken_of_are_options(call):
    """`--name` in the text, outside of any command."""
    helps = "".join(call(f"{name}.py", "--help")[1] for name in
                    ("train", "sample", "verify", "evaluate"))  # fmt: skip
    others = "".join(p.read_text("utf-8") for folder in ("benchmarks", "docs", "nanolaser")
                     for p in (ROOT / folder).rglob("*.py"))  # fmt: skip
    for page in PAGES:
        for option in re.findall(r"`(--[a-z][\w-]*)", page.read_text("utf-8")):
            field = rf"^    {option[2:].replace('-', '_')}: "  # of a benchmark's Options
            assert (re.search(rf"{option}\b(?!-)", helps) or f'"{option}"' in others
                    or re.search(field, others, re.MULTILINE)), (page, option)  # fmt: skip
