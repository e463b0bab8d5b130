"""The command line made of a dataclass: values, help, and one line for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from nanolaser.cli import (
    ModelOptions,
    Progress,
    apply_preset,
    check_options,
    main_guard,
    near,
    option,
    paper_defaults,
    parse_args,
    warn,
)

ROOT = Path(__file__).parents[1]


@dataclass
class Options:
    """One field of every kind that the scripts use."""

    problem: str | None = option(None, "the problem's text, - for standard input", group="input")
    model: str = option("tiny", "alias, hub id or folder", group="model")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"), group="model")
    steps: int = option(360, "updates to make", min=1, paper=800, group="training")
    lr: float = option(4e-4, "learning rate", above=0, paper=1e-6, group="training")
    tau: float = option(0.1, "share of 100 % for A_s", min=0, max=1, group="training")
    temperature: float = option(1.0, "of sampling", min=0)
    c_ref: float | str = option("auto", "reference log-probability", words=("auto",))
    data: tuple[str, ...] = option(("arithmetic",), "data sets")
    ks: tuple[int, ...] = option((), "numbers of votes", min=1)
    gold: str | None = option(None, "the right answer")
    vote: bool = option(False, "let the solutions vote")
    stream: bool = option(True, "print while sampling")
    max_new_tokens: int = option(256, "longest response", min=1)

    def __post_init__(self):
        if self.gold == "forbidden":
            raise ValueError("gold must not be\nforbidden")


def parse(*argv):
    return parse_args(Options, argv, positional="problem")


def refused(capsys, *argv) -> str:
    """The one line that a bad command line gets; checks the exit code on the way."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def test_nothing_given_is_the_dataclass():
    options, given = parse()
    assert options == Options() and given == frozenset()


@pytest.mark.parametrize("argv, name, value", [
    (["--steps", "4"], "steps", 4),
    (["--steps=4"], "steps", 4),
    (["--lr", "3e-4"], "lr", 3e-4),
    (["--tau", "0"], "tau", 0.0),                        # bounds are inclusive
    (["--temperature", "0"], "temperature", 0.0),        # a word beside them
    (["--c-ref", "auto"], "c_ref", "auto"),
    (["--c-ref", "-23"], "c_ref", -23.0),
    (["--c-ref", "-2.3e1"], "c_ref", -23.0),             # argparse takes it for a flag
    (["--data", "a, b,c"], "data", ("a", "b", "c")),
    (["--ks", "1,2"], "ks", (1, 2)),
    (["--gold", "-1/2"], "gold", "-1/2"),
    (["--gold", "-x"], "gold", "-x"),
    (["--gold="], "gold", ""),
    (["--gold", "a=b"], "gold", "a=b"),
    (["--gold", "5"], "gold", "5"),
    (["--vote"], "vote", True),
    (["--no-vote"], "vote", False),
    (["--no-stream"], "stream", False),
    (["--stream"], "stream", True),
    (["2+3=?"], "problem", "2+3=?"),
    (["-"], "problem", "-"),
    (["--", "-2+3=?"], "problem", "-2+3=?"),
    (["--", "--help"], "problem", "--help"),
    (["--steps", "4", "--steps", "5"], "steps", 5),
])
def test_values(argv, name, value):
    options, given = parse(*argv)
    assert getattr(options, name) == value and type(getattr(options, name)) is type(value)
    assert given == {name}
    assert {k: v for k, v in asdict(options).items() if k != name} == {
        k: v for k, v in asdict(Options()).items() if k != name}


def test_positional_between_flags():
    options, given = parse("--vote", "2+3=?", "--steps", "4")
    assert (options.problem, options.vote, options.steps) == ("2+3=?", True, 4)
    assert given == {"problem", "vote", "steps"}


@pytest.mark.parametrize("argv, says", [
    (["--stpes", "4"], "did you mean --steps "),
    (["--max-new", "4"], "--max-new-tokens?"),    # no abbreviations, but a guess
    (["--max_new_tokens", "4"], "--max-new-tokens?"),
    (["--qqqq"], "--help"),
    (["-2+3=?"], "put -- before"),
    (["--steps"], "--steps needs a value"),
    (["--steps", "--vote"], "--steps needs a value"),
    (["--steps", "x"], "'x'"),
    (["--steps", "1.5"], "a whole number"),
    (["--steps", "0"], "at least 1"),
    (["--steps", "10000000000000"], "at most"),    # every count is bounded
    (["--steps", "9" * 5000], "a whole number"),
    (["--lr", "0"], "above 0"),
    (["--lr", "nan"], "a number"),
    (["--lr", "inf"], "a number"),
    (["--tau", "1.01"], "at most 1"),
    (["--temperature", "1e300"], "at most 100"),
    (["--temperature", "1e-300"], "at least 0.01"),
    (["--c-ref", "never"], "auto or a number"),
    (["--device", "gpu"], "auto, cpu, cuda"),
    (["--data", "a,,b"], "empty entry"),
    (["--ks", "1,0"], "at least 1"),
    (["--vote=1"], "takes no value"),
    (["one", "two"], "'two'"),
    (["--gold", "forbidden"], "gold must not be forbidden"),  # the class's own check
])
def test_mistakes_are_one_line(capsys, argv, says):
    line = refused(capsys, *argv)
    assert says in line and len(line) < 200


def test_no_positional_allowed(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(Options, ["word"])
    assert stop.value.code == 2 and "'word'" in capsys.readouterr().err


def test_help_shows_every_option_with_default_and_heading(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(Options, ["--help"], description="What it does.", positional="problem")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    assert "What it does." in text
    for heading in ("input:", "model:", "training:", "options:", "help:"):
        assert f"\n{heading}\n" in text
    # the real values, both of them, where they depend on the model
    assert "--steps N updates to make (default: 360; 800 with other models)" in flat
    assert "--lr X learning rate (default: 0.0004; 1e-06 with other models)" in flat
    assert "share of 100 % for A_s (default: 0.1)" in flat
    assert "--device {auto,cpu,cuda}" in flat and "--c-ref auto|X" in flat
    assert "--data TEXT,... data sets (default: arithmetic)" in flat
    assert "--no-stream turn off: print while sampling (default: on)" in flat
    assert " --stream" not in flat
    assert max(map(len, text.splitlines())) <= 100


def test_the_papers_defaults_fill_what_was_not_given():
    options, given = parse("--steps", "360")
    full = apply_preset(options, given, paper_defaults(Options))
    assert paper_defaults(Options) == {"steps": 800, "lr": 1e-6}
    assert (full.steps, full.lr) == (360, 1e-6)  # given although equal to the default
    assert options.lr == 4e-4  # a copy
    with pytest.raises(TypeError, match="stepz"):  # a preset with a typo is a bug
        apply_preset(options, given, {"stepz": 1})


def test_what_a_file_holds_goes_through_the_same_checks():
    values = {"steps": 4, "tau": 0, "c_ref": "auto", "data": ["a", "b"], "gold": None, "vote": True}
    options = check_options(Options, values, "here")
    assert options == Options(steps=4, tau=0.0, data=("a", "b"), vote=True)
    assert type(options.tau) is float  # JSON has one kind of number
    whole = asdict(parse("--c-ref", "-20", "--ks", "1,2")[0])
    assert asdict(check_options(Options, whole, "here")) == whole


@pytest.mark.parametrize("values, says", [
    ({"steps": -1}, "--steps"), ({"steps": 10**30}, "--steps"), ({"steps": "4"}, "--steps"),
    ({"steps": 4.0}, "--steps"), ({"steps": True}, "--steps"), ({"steps": None}, "--steps"),
    ({"steps": [4]}, "--steps"), ({"lr": 10**400}, "--lr"), ({"lr": float("nan")}, "--lr"),
    ({"temperature": 1e300}, "--temperature"), ({"tau": {}}, "--tau"), ({"vote": 1}, "--vote"),
    ({"temperature": False}, "--temperature"), ({"model": 5}, "--model"),
    ({"data": "a"}, "--data"), ({"data": ["a", 5]}, "--data"), ({"device": "gpu"}, "--device"),
    ({"c_ref": "never"}, "--c-ref"), ({"nope": 1}, "nope"), ({"gold": "forbidden"}, "gold"),
])
def test_what_a_file_must_not_hold_is_one_line(values, says):
    with pytest.raises(ValueError) as error:
        check_options(Options, values, "runs/x/config.json")
    line = str(error.value)
    assert line.startswith("runs/x/config.json: ") and says in line and len(line) < 200


def test_near():
    assert near("math50", ["math500", "gsm8k"], "no") == "did you mean math500?"
    assert near("zzz", ["math500", "gsm8k"], "no") == "no"


@pytest.mark.parametrize("raised, code, says", [
    (ValueError("two\nlines"), 2, "error: two lines\n"),
    (FileNotFoundError(2, "No such file or directory", "a.txt"), 2,
     "error: No such file or directory: a.txt\n"),
    (FileNotFoundError("no model in x; train one"), 2, "error: no model in x; train one\n"),
    (OSError("disk is full"), 2, "error: disk is full\n"),
    (ValueError(), 2, "error: ValueError\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_main_guard(capsys, monkeypatch, raised, code, says):
    monkeypatch.delenv("NANOLASER_TRACEBACK", raising=False)

    def main():
        raise raised

    with pytest.raises(SystemExit) as stop:
        main_guard(main)
    assert stop.value.code == code and capsys.readouterr().err == says


def test_main_guard_lets_bugs_through(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        main_guard(lambda: 1 // 0)
    monkeypatch.setenv("NANOLASER_TRACEBACK", "1")
    with pytest.raises(ValueError):
        main_guard(lambda: int("x"))


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (3, 3)])
def test_main_guard_exit_code(returned, code):
    with pytest.raises(SystemExit) as stop:
        main_guard(lambda: returned)
    assert stop.value.code == code


def test_closed_pipe_is_quiet():
    """`script | head -1`: no traceback, no message, although far more was to be printed."""
    script = ("from nanolaser.cli import main_guard\n"
              "main_guard(lambda: print('line\\n' * 200000))")
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 141


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_closed_streams(tmp_path):
    """What a shell closed gets nothing, and no file gets its number: what is printed and warned
    would be written into the file."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom nanolaser.cli import main_guard, standard_input, warn\n"
        "def main():\n"
        "    with open('file', 'w') as file:\n"
        "        os.write(1, b'library'), os.write(2, b'library'), print('x'), warn('y')\n"
        "        file.write(repr(standard_input()))\n"
        "main_guard(main)\n"
    )
    run = lambda closed: subprocess.run(  # noqa: E731
        f'"{sys.executable}" -W error script.py {closed}', shell=True, cwd=tmp_path,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    for closed in ("", ">&-", "2>&-", ">&- 2>&-"):
        assert run(closed).returncode == 0
        assert (tmp_path / "file").read_text() == "b''", closed
    done = run("<&-")
    assert done.returncode == 2 and "standard input is closed" in done.stderr
    assert "Traceback" not in done.stderr


@dataclass
class Comparing(ModelOptions):
    compare: tuple[str, ...] = option((), "two folders", group="mine", count=2)
    n: int | None = option(None, "solutions", group="mine", shown="1, or 8")


@pytest.mark.parametrize("argv", [["--compare", "a", "b"], ["--compare", "a,b"], ["--compare=a,b"],
                                  ["--compare", "a", "b", "--n", "3"]])  # fmt: skip
def test_an_option_of_two_words(argv):
    options, given = parse_args(Comparing, argv)
    assert options.compare == ("a", "b") and "compare" in given
    assert options.n == (3 if "--n" in argv else None)


def test_a_class_shows_its_own_options_before_inherited_ones(capsys):
    with pytest.raises(SystemExit):
        parse_args(Comparing, ["--help"])
    out = capsys.readouterr().out
    assert out.index("--compare") < out.index("--model") and "(default: 1, or 8)" in out


@pytest.mark.parametrize("argv", [["--seed", str(2**64)], ["--c-ref", "5"], ["--beta-v", "1e300"],
                                  ["--n", "1000000000000"]])  # fmt: skip
def test_numbers_without_sense_are_refused_before_a_model_is_loaded(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        parse_args(Comparing, argv)
    assert stop.value.code == 2 and argv[0] in capsys.readouterr().err


def test_warnings_are_one_line_of_the_first_process(capsys, monkeypatch):
    warn("a\nb")
    assert capsys.readouterr() == ("", "warning: a b\n")
    monkeypatch.setenv("RANK", "1")
    warn("a")
    assert capsys.readouterr() == ("", "")


def test_progress_without_a_terminal_is_plain_lines_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "SECONDS", 0.02)
    with Progress("c_ref", 300, "solution") as progress:
        for _ in range(5):  # nobody ends a solution: there is a sign of life all the same
            progress.step([None])
            time.sleep(0.03)
        progress.update(2)
        for _ in range(5000):  # and no flood of them
            progress.step([])
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err and "\x1b" not in err and 2 <= len(lines) <= 20
    assert "0 of 300 solutions" in lines[0] and " tokens" in lines[0]
    assert "2 of 300 solutions" in lines[-1]
    monkeypatch.setenv("RANK", "1")
    with Progress("c_ref", 300, "solution") as progress:
        time.sleep(0.1)
        progress.update()
    assert capsys.readouterr() == ("", "")
