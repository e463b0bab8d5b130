"""The command line made of a dataclass: values, help, and one line for every mistake."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from nanolaser.cli import ModelOptions, apply_preset, main_guard, near, option, parse_args

ROOT = Path(__file__).parents[1]


@dataclass
class Options:
    """One field of every kind that the scripts use."""

    problem: str | None = option(None, "the problem's text, - for standard input", group="input")
    model: str = option("tiny", "alias, hub id or folder", group="model")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"), group="model")
    steps: int | None = option(None, "updates to make", min=1, by_model=True, group="training")
    lr: float = option(1e-6, "learning rate", above=0, group="training")
    tau: float = option(0.1, "share of 100 % for A_s", min=0, max=1, group="training")
    c_ref: float | str = option("auto", "reference log-probability", words=("auto",))
    data: tuple[str, ...] = option(("arithmetic",), "data sets")
    ks: tuple[int, ...] | None = option(None, "numbers of votes", min=1)
    gold: str | None = option(None, "the right answer")
    vote: bool = option(False, "let the solutions vote")
    stream: bool = option(True, "print while sampling")
    resume: bool | None = option(None, "go on where a run stopped", by_model=True)
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
    (["--c-ref", "auto"], "c_ref", "auto"),
    (["--c-ref", "-23"], "c_ref", -23.0),
    (["--c-ref", "-2.3e1"], "c_ref", -23.0),             # argparse alone takes it for a flag
    (["--data", "a, b,c"], "data", ("a", "b", "c")),
    (["--ks", "1,2"], "ks", (1, 2)),
    (["--gold", "-1/2"], "gold", "-1/2"),
    (["--gold", "-x"], "gold", "-x"),
    (["--gold="], "gold", ""),
    (["--gold", "a=b"], "gold", "a=b"),
    (["--vote"], "vote", True),
    (["--no-stream"], "stream", False),
    (["--stream"], "stream", True),
    (["--resume"], "resume", True),
    (["--no-resume"], "resume", False),
    (["2+3=?"], "problem", "2+3=?"),
    (["-"], "problem", "-"),
    (["--", "-2+3=?"], "problem", "-2+3=?"),
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
    (["--stpes", "4"], "unknown option --stpes; did you mean --steps"),
    (["--max-new", "4"], "did you mean --max-new-tokens"),    # no abbreviations
    (["--max_new_tokens", "4"], "did you mean --max-new-tokens"),
    (["--qqqq"], "unknown option --qqqq; --help lists them all"),
    (["--no-vote"], "unknown option --no-vote"),              # off already
    (["-2+3=?"], "put -- before a problem that starts with a dash"),
    (["--steps"], "--steps needs a value"),
    (["--steps", "--vote"], "--steps needs a value"),
    (["--steps", "x"], "--steps: expected a whole number, got 'x'"),
    (["--steps", "1.5"], "expected a whole number"),
    (["--steps", "0"], "--steps: must be at least 1, got 0"),
    (["--lr", "0"], "--lr: must be above 0"),
    (["--lr", "nan"], "expected a number"),
    (["--lr", "inf"], "expected a number"),
    (["--tau", "1.01"], "--tau: must be at most 1, got 1.01"),
    (["--c-ref", "never"], "--c-ref: expected auto or a number, got 'never'"),
    (["--device", "gpu"], "unknown value 'gpu', choose from auto, cpu, cuda"),
    (["--data", "a,,b"], "empty entry"),
    (["--ks", "1,0"], "at least 1"),
    (["--vote=1"], "--vote takes no value"),
    (["one", "two"], "unexpected argument 'two'"),
    (["--gold", "forbidden"], "gold must not be forbidden"),  # the class's own check
])
def test_mistakes_are_one_line(capsys, argv, says):
    assert says in refused(capsys, *argv)


def test_no_positional_allowed(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(Options, ["word"])
    assert stop.value.code == 2
    assert "unexpected argument 'word'; options start with --" in capsys.readouterr().err


def test_help_shows_every_option_with_default_and_heading(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(Options, ["--help"], description="What it does.", positional="problem")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    assert "What it does." in text
    for heading in ("input:", "model:", "training:", "options:", "help:"):
        assert f"\n{heading}\n" in text
    assert "--steps N updates to make (default: by model)" in flat
    assert "--lr X learning rate (default: 1e-06)" in flat
    assert "share of 100 % for A_s (default: 0.1)" in flat
    assert "--device {auto,cpu,cuda}" in flat and "--c-ref auto|X" in flat
    assert "--data TEXT,... data sets (default: arithmetic)" in flat
    assert "--no-stream turn off: print while sampling (default: on)" in flat
    assert " --stream" not in flat
    assert max(map(len, text.splitlines())) <= 100


def test_preset_fills_what_was_not_given():
    options, given = parse("--lr", "1e-6")
    full = apply_preset(options, given, {"lr": 3e-4, "steps": 120})
    assert (full.lr, full.steps) == (1e-6, 120)        # given although equal to the default
    assert options.steps is None                       # a copy
    with pytest.raises(ValueError, match="stepz"):
        apply_preset(options, given, {"stepz": 1})


def test_near():
    assert near("math50", ["math500", "gsm8k"]) == ["math500"]
    assert near("zzz", ["math500", "gsm8k"]) == []


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
