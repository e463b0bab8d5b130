"""
A dataclass of options becomes a command line: its fields *are* the flags and their help.

    @dataclass
    class Options:
        steps: int = option(360, "updates to make", min=1, paper=800, group="training")
        c_ref: float | str = option("auto", "reference log-probability (nats)", words=("auto",))
        vote: bool = option(False, "let the solutions vote")

    options, given = parse_args(Options)                  # --steps 40 --c-ref -23 --vote
    options = apply_preset(options, given, paper_defaults(Options))     # steps stays 40

A value travels  text --_convert--> value --_check--> options.  What a file holds (the config.json
of a run that is resumed) enters at the second arrow, `check_options`: one truth about bounds.  A
flag that does not exist or a value that does not fit is one line on stderr and exit code 2:
training for an hour under a default because of a typo is the costliest silent bug of a script.

Below that, what every script says on stderr (warn, Progress) and how it ends (main_guard).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import inspect
import math
import os
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

# Not argparse: it takes the value of `--gold -1/2` for a flag, lets `--save` mean `--save-every`
# until the day `--save-all` is added, and answers a typo with a page.

Options = TypeVar("Options")

_SAME = object()  # `paper` not given: the default holds for every model
MOST = 1_000_000  # of any count without a `max` of its own: a zero too many must not run for ever
# Bounds that hold wherever an option has that name.  Seeds are multiplied and added up in 64 bits.
# Beyond a temperature of 100 all tokens are alike, below 0.01 only the likeliest is left, which is
# what 0 says (allowed where the option's own min is 0).  c_ref is a log-probability.
BOUNDS = {"seed": (-(2**40), 2**40), "temperature": (0.01, 100.0), "kv_cache_gb": (0.001, 1e5),
          "c_ref": (-1000.0, 0.0), "beta_v": (1e-6, 1e6)}  # fmt: skip


def option(
    default: Any, help: str, *, group: str = "options", choices: Sequence = (),
    words: Sequence = (), min: float | None = None, max: float | None = None,
    above: float | None = None, paper: Any = _SAME, metavar: str | None = None, count: int = 1,
    shown: str | None = None,
) -> Any:  # fmt: skip
    """One field of an options dataclass: its default, its meaning, what it accepts.

    `min` and `max` are inclusive bounds, `above` an exclusive one; `choices` are the only values
    allowed, `words` those allowed beside a number (`--c-ref auto`).  `paper` is the default of all
    models but the embedded, where it differs.  A tuple takes a comma list; with `count`, as well
    that many words (`--compare A B`).  `shown` is what --help says of a default that depends.
    """
    # Everything lives in the field's metadata, so that the class stays a plain dataclass: it can
    # be built in a test, compared, and dumped with dataclasses.asdict without any of this file.
    metadata = {name: value for name, value in locals().items() if name != "default"}
    return dataclasses.field(default=default, metadata=metadata)


def parse_args(
    cls: type[Options], argv: Sequence[str] | None = None, description: str | None = None,
    positional: str | None = None,
) -> tuple[Options, frozenset[str]]:  # fmt: skip
    """The options that a command line (`argv`, or the process's) asks for, and the names of those
    given.  `positional` names the one field that is given without a flag.  Bad input, a ValueError
    of the class's own `__post_init__` included, ends the program: one line, exit code 2."""
    specs = _specs(cls)
    try:
        values = _read(list(sys.argv[1:] if argv is None else argv), specs, positional)
        if values is not None:
            # Only what was typed is in `values`: the defaults stay in one place, the dataclass.
            return cls(**values), frozenset(values)
    except ValueError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    print(_help(specs, description or "", positional))
    sys.exit(0)


def check_options(cls: type[Options], values: Mapping[str, Any], where: str) -> Options:
    """Options out of a file's JSON values, checked as those of a command line are; ValueError, one
    line that begins with `where`, for an unknown name or a value that does not fit."""
    specs, checked = _specs(cls), {}
    try:
        for name, value in values.items():
            if name not in specs:
                raise ValueError(f"there is no option {name}; is it another version's?")
            checked[name] = _check(value, specs[name])
        return cls(**checked)  # what the file does not name keeps its default
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def paper_defaults(cls: type) -> dict[str, Any]:
    """{name: default} of the options whose default differs for other models than the embedded."""
    return {s.name: s.paper for s in _specs(cls).values() if s.paper is not _SAME}


def apply_preset(options: Options, given: Iterable[str], preset: Mapping[str, Any]) -> Options:
    """A copy of `options` in which every option that was not given takes the preset's value."""
    # The user's word first, then the model's preset, then the dataclass.  By name, not by comparing
    # with the default: `--lr 1e-6` is meant even if 1e-6 is the default.
    given = set(given)
    return dataclasses.replace(options, **{k: v for k, v in preset.items() if k not in given})


@dataclasses.dataclass
class ModelOptions:
    """The options of every script that only uses a model; a script's own ones come before them."""

    model: str = option("tiny", "tiny (embedded), an alias, a hub id, a checkpoint's folder or a "
                                "run's, which means its newest checkpoint", group="model")
    device: str = option("auto", "where to compute", group="model", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of the forward pass; auto: bfloat16 on a GPU, unless the model is "
                                "stored in float32", group="model",
                        choices=("auto", "float32", "bfloat16"))
    z_c: str | None = option(None, "token at which r_s is read", group="model", metavar="TOKEN",
                             shown="the model's")
    c_ref: float | None = option(None, "reference log-probability in nats", group="model",
                                 shown="the model's")
    beta_v: float | None = option(None, "scale of r_s", group="model", shown="the model's")
    thinking: bool | None = option(None, "think before answering, where the chat template knows "
                                         "that", group="model", shown="as the template has it")
    seed: int = option(0, "of the sampling", group="model")


# ---------------------------------------------------------------------------------------------
# from fields to flags, and their help


def _specs(cls: type) -> dict[str, types.SimpleNamespace]:
    """{name: all about that option}, in the order of --help: the class's own before inherited."""
    # get_type_hints also resolves the strings that `from __future__ import annotations` leaves.
    hints, specs = typing.get_type_hints(cls), {}
    home = {name: c for c in cls.__mro__[::-1] for name in inspect.get_annotations(c)}
    for field in sorted(dataclasses.fields(cls), key=lambda f: cls.__mro__.index(home[f.name])):
        # `float | str | None` -> {float, str, None}.  None is "not given", and str beside a number
        # is there for the `words`: neither decides what is parsed.
        name, hint = field.name, hints[field.name]
        parts = typing.get_args(hint) or (hint,)
        s = types.SimpleNamespace(**field.metadata, name=name, default=field.default,
                                  kind=next(k for k in (bool, int, float, str) if k in parts),
                                  many=typing.get_origin(hint) is tuple,
                                  none=types.NoneType in parts,
                                  flag="--" + name.replace("_", "-"))  # fmt: skip
        # Every number is bounded somewhere: by its name, by its field, or as a count.
        if name in BOUNDS:
            if s.kind is float and s.min == 0:
                s.words = (0.0, *s.words)
            s.min, s.max = BOUNDS[name]
        elif s.kind is int and s.max is None:
            s.max = MOST
        specs[name] = s
    return specs


def _help(specs: Mapping[str, Any], description: str, positional: str | None) -> str:
    """What --help prints: the flags under their headings, each with its meaning and default."""
    #     --steps N                       updates to make (default: 360; 800 with other models)
    usage = f"usage: {Path(sys.argv[0]).name} [options]" + f" [{positional}]" * bool(positional)
    lines = [usage, "", *textwrap.wrap(description.strip(), 100)]
    groups: dict[str, list[tuple[str, str]]] = {}  # in the order in which they appear
    for s in specs.values():
        # The real value, and both where the embedded model has another one than the paper's runs.
        default = s.shown or _text(s.default)
        if s.shown is None and s.paper is not _SAME:
            default += f"; {_text(s.paper)} with other models"
        text = f"{s.help} (default: {default})"
        if s.kind is bool:  # the flag that would change something
            flag = f"--no-{s.flag[2:]}" if s.default else s.flag
            flag += f", --no-{s.flag[2:]}" if s.none else ""  # three states: neither is a third
            text = f"turn off: {text}" if s.default else text
        else:
            kind = {int: "N", float: "X", str: "TEXT"}[s.kind]
            words = "|".join([*map(_text, s.words), kind]) + ",..." * s.many
            value = s.metavar or ("{" + ",".join(s.choices) + "}" if s.choices else words)
            flag = s.name if s.name == positional else f"{s.flag} {value}"
        groups.setdefault(s.group, []).append((flag, text))
    groups["help"] = [("-h, --help", "show this text and exit")]
    for heading, entries in groups.items():
        lines += ["", f"{heading}:"]
        for flag, text in entries:
            # A fixed width: the same text in a narrow terminal, a pipe and the README.
            first, rest = f"  {flag:<31} ", " " * 34
            lines += textwrap.wrap(text, 100, initial_indent=first, subsequent_indent=rest)
    return "\n".join(lines)


def _text(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else f"{value}"


# ---------------------------------------------------------------------------------------------
# from texts to values


def _read(argv: list[str], specs: Mapping[str, Any], positional: str | None) -> dict | None:
    """{name: value} of a command line, None where it asks for help; ValueError with the reason."""
    # --vote --n 8 "2+3=?"  ->  {"vote": True, "n": 8, "problem": "2+3=?"}, word by word.  The value
    # of an option with choices or bounds is checked when it is read: the first mistake is said.
    flags = {s.flag: s for s in specs.values() if s.name != positional}
    flags |= {f"--no-{s.flag[2:]}": s for s in specs.values() if s.kind is bool}
    values, loose, rest = {}, [], list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, text = word.partition("=")
        if word in ("-h", "--help"):
            return None
        if word == "--":  # all that follows is plain text
            loose, rest = loose + rest, []
        elif word == "-" or not word.startswith("-"):  # "-" alone stands for standard input
            loose.append(word)
        elif flag not in flags:
            # No abbreviations: what is meant by half a name may change with the next version.
            # --max_new_tokens is the Python name of an option: the guess finds the dashed one.
            otherwise = "--help lists them all"
            if positional is not None and not flag.startswith("--"):
                otherwise = f"put -- before a {positional} that starts with a dash"
            hint = near(flag.replace("_", "-"), [*flags, "--help"], otherwise)
            raise ValueError(f"unknown option {flag}; {hint}")
        elif flags[flag].kind is bool:  # --vote and --no-vote, and never --vote=yes
            if equals:
                raise ValueError(f"{flag} takes no value")
            values[flags[flag].name] = flag == flags[flag].flag
        elif not equals and (not rest or rest[0].startswith("--")):
            # One dash may begin a value, two are far likelier the next flag.
            raise ValueError(f"{flag} needs a value")
        else:
            words, spec = [text] if equals else [rest.pop(0)], flags[flag]
            while len(words) < spec.count and rest and not rest[0].startswith("--"):
                words.append(rest.pop(0))
            values[spec.name] = _convert(",".join(words), spec)
    # Too many words are nearly always one text whose quotes were forgotten: 2 + 3 = ?
    allowed = 0 if positional is None else 1
    if len(loose) > allowed:
        hint = "quote a text that has spaces" if allowed else "options start with --"
        raise ValueError(f"unexpected argument {loose[allowed]!r}; {hint}")
    return values | {positional: _convert(x, specs[positional]) for x in loose}


def near(name: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean math500?` where a known name is like this one, else `otherwise`."""
    # A cut-off name ("--max-new") is a good guess although difflib, which compares whole strings,
    # scores it low.
    known = list(known)
    alike = [k for k in known if k.startswith(name) and len(name) > 2]
    alike += difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(list(dict.fromkeys(alike))[:3])}?" if alike else otherwise


def _convert(text: str, spec: Any) -> Any:
    """An option's value out of its text."""

    def one(part: str) -> Any:
        with contextlib.suppress(ValueError):  # what is no number stays text: a word, or refused
            return spec.kind(part)
        return part

    return _check([one(p.strip()) for p in text.split(",")] if spec.many else one(text), spec)


def _check(value: Any, spec: Any) -> Any:
    """The value if its option may have it, tuples for lists; ValueError says why it may not."""
    if spec.many:
        if not isinstance(value, (list, tuple)) or "" in value:
            raise ValueError(f"{spec.flag}: an empty entry in the list, or no list: {value!r:.80}")
        return tuple(_check_one(part, spec) for part in value)
    return None if value is None and spec.none else _check_one(value, spec)


def _check_one(value: Any, spec: Any) -> Any:
    """One value, or one of a list, against its option's type, words, choices and bounds."""
    # JSON's 1 for 1.0; an integer of 400 digits has no float, and is refused as no number below.
    if spec.kind is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    # By type, for True is an int to Python; and "nan" fails no comparison, so it is refused here.
    fits = type(value) is spec.kind and (spec.kind is not float or math.isfinite(value))
    if value in spec.words and (fits or isinstance(value, str)):
        return value
    # The first of these that is broken is the message: "must be auto or at least 1, got 0".
    kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    for broken, wanted in (
        (lambda: not fits, kind[spec.kind]),
        (lambda: spec.choices and value not in spec.choices, ", ".join(map(str, spec.choices))),
        (lambda: spec.min is not None and value < spec.min, f"at least {spec.min}"),
        (lambda: spec.above is not None and value <= spec.above, f"above {spec.above}"),
        (lambda: spec.max is not None and value > spec.max, f"at most {spec.max}"),
    ):
        if broken():
            wanted = " or ".join([*map(_text, spec.words), wanted])
            raise ValueError(f"{spec.flag}: must be {wanted}, got {value!r:.80}")
    return value


# ---------------------------------------------------------------------------------------------
# what a script says, and how it ends


def speaks() -> bool:
    """Is this the process that talks to the user?  Of many, torchrun's first one is."""
    return os.environ.get("RANK", "0") == "0"


def is_terminal() -> bool:
    """Is somebody watching?  Progress bars are for terminals; logs get lines."""
    return speaks() and sys.stderr.isatty() and "CI" not in os.environ


def warn(text: str) -> None:
    """Say on stderr, on one line, what is odd and yet no reason to stop."""
    if speaks():
        tqdm.write(f"warning: {' '.join(text.split())}", file=sys.stderr)  # above a bar, if any


class Progress:
    """How far something long is: a bar on a terminal, elsewhere a plain line every ten seconds.

    with Progress("c_ref", 300, "solution") as progress:
        generate(..., **progress.hooks())
    """

    # A first solution of 8,192 tokens takes minutes, so tokens are a sign of life of their own.
    SECONDS = 10.0

    def __init__(self, label: str, total: int, unit: str, done: int = 0, shown: bool = True):
        self.label, self.total, self.unit, self.done, self.drawn = label, total, unit, done, 0
        self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, leave=False, smoothing=0,
                        disable=not (shown and is_terminal()))  # fmt: skip
        self.lines = shown and speaks() and self.bar.disable
        self.began = self.said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def hooks(self) -> dict[str, Callable]:
        """What the sampler is to call: generate(..., **progress.hooks())."""
        return {"on_step": self.step, "on_finish": lambda _: self.update()}

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        self.bar.update(count)
        self._say()

    def step(self, rollouts: Sequence) -> None:
        """Each of these drew one more token (or was read at its end)."""
        self.drawn += len(rollouts)
        self._say()

    def _say(self) -> None:
        # A line every ten seconds is a sign of life in a log; a bar may be redrawn every second.
        now = time.monotonic()
        if now - self.said < (self.SECONDS if self.lines else 1.0):
            return
        self.said, tokens = now, f"{self.drawn} tokens" * bool(self.drawn)
        self.bar.set_postfix_str(tokens)
        if self.lines:
            said = [f"{self.label}: {self.done} of {self.total} {self.unit}s", tokens,
                    f"{now - self.began:.0f} s"]  # fmt: skip
            print(", ".join(filter(None, said)), file=sys.stderr, flush=True)


def standard_input() -> bytes:
    """All of standard input; ValueError if the shell closed it (<&-)."""
    if sys.stdin is None:
        raise ValueError("standard input is closed: there is nothing to read")
    return sys.stdin.buffer.read()


def main_guard(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit: 0 or what it returns, 2 for user errors, 1 for a full disk or
    (among many processes) the death of another one, 130 for Ctrl-C."""
    # ValueError and OSError (FileNotFoundError among them) are what this project raises for bad
    # input, so they become one `error: ...` line.  Anything else is a bug and keeps its traceback,
    # as these do when NANOLASER_TRACEBACK is set in the environment.
    _occupy_closed_streams()
    try:
        code = main()
        sys.stdout.flush()  # here, so that a reader who went away is met inside the try
    except KeyboardInterrupt:
        # Ctrl-C is how a long run is ended: no traceback.  128 + SIGINT is what shells expect.
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # `sample.py ... | head` has seen enough: no message.  stdout must point somewhere, or the
        # interpreter complains when it flushes it once more at exit.  141 is 128 + SIGPIPE.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except (ValueError, OSError) as error:
        if os.environ.get("NANOLASER_TRACEBACK"):
            raise
        # What no other option would have changed: space, quota (unknown to Windows), file size.
        spent = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
        full = isinstance(error, OSError) and error.errno in spent
        hint = "; what was written before it is whole" if full else ""
        print(f"error: {_one_line(error)}{hint}", file=sys.stderr)
        code = 1 if full or isinstance(error, ConnectionResetError) else 2
    except SystemExit as end:
        code = end.code
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # The threads of gloo and NCCL abort or block an interpreter that ends in its own way while
        # the other processes are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code or 0)


def _occupy_closed_streams() -> None:
    """Let what is written to a stream that the shell closed (>&-, 2>&-) go nowhere."""
    # Its number is free, so the next file opened would get it, and what a library prints would
    # land in the midst of a checkpoint.  os.open takes the lowest free number: just this one.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if number and getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _one_line(error: BaseException) -> str:
    """An exception as one line without Python's decoration."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"  # not "[Errno 2] ...: 'name'"
    return " ".join(str(error).split()) or type(error).__name__
