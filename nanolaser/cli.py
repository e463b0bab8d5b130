"""A dataclass of options becomes a command line: its fields *are* the flags and their help.

    @dataclass
    class Options:
        steps: int | None = option(None, "updates to make", min=1, by_model=True, group="training")
        c_ref: float | str = option("auto", "reference log-probability (nats)", words=("auto",))
        vote: bool = option(False, "let the solutions vote")

    options, given = parse_args(Options)        # --steps 40 --c-ref -23 --vote
    options = apply_preset(options, given, {"steps": 120})

Field names become --dashed-names, and the type of a field decides what its flag accepts.  A flag
that does not exist or a value that does not fit is one line on stderr and exit code 2: training
for an hour under a default because of a typo is the costliest silent bug a script can have.

argparse draws the help and fills in the values; what its messages would turn into a usage dump
(unknown flags, missing values, values that start with a dash) is looked at before it, in
`_normalise`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

Options = TypeVar("Options")

# How a type is called in an error message: in the user's words, not in Python's.
_TYPE_WORDS = {int: "a whole number", float: "a number", str: "text"}
# What stands for the value in --help.
_METAVARS = {int: "N", float: "X", str: "TEXT"}
# What the machine ran out of, which no other option would have changed: space, quota, file size.
# (Windows knows no quota.)
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def option(
    default: Any,
    help: str,
    *,
    group: str = "options",
    choices: Iterable[Any] | None = None,
    words: Sequence[str] = (),
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    by_model: bool = False,
    metavar: str | None = None,
    count: int = 1,
    shown: str | None = None,
) -> Any:
    """One field of an options dataclass: its default, its meaning, what it accepts.

    `min` and `max` are inclusive bounds, `above` an exclusive one; `choices` are the only values
    allowed; `words` are texts allowed beside a number (`--c-ref auto`).  `by_model` says that the
    default None stands for a value that depends on the model, and --help then says so.  A tuple
    takes a comma list; with `count`, as well that many separate words (`--compare A B`).  `shown`
    is what --help says of a default that depends on other options.
    """
    # Everything lives in the field's metadata, so that the class stays a plain dataclass: it can
    # be built in a test, compared, and dumped with dataclasses.asdict without any of this file.
    metadata = dict(help=help, group=group, choices=tuple(choices) if choices else None,
                    words=tuple(words), min=min, max=max, above=above, by_model=by_model,
                    metavar=metavar, count=count, shown=shown)
    return dataclasses.field(default=default, metadata=metadata)


def parse_args(
    cls: type[Options],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    positional: str | None = None,
) -> tuple[Options, frozenset[str]]:
    """The options that a command line asks for, and the names of those given explicitly.

    `cls` is a dataclass whose fields are made with `option`; `argv` is sys.argv[1:] when None;
    `positional` names the one field that is given without a flag.  Bad input, a ValueError of the
    class's own `__post_init__` included, ends the program with one line and exit code 2.
    """
    # No abbreviations: --save would silently mean --save-every until the day --save-all is added.
    # No usual -h: it would come first, under a heading of its own (see _add_arguments).
    parser = _Parser(description=description, allow_abbrev=False, add_help=False,
                     formatter_class=_formatter)
    specs = _specs(cls)
    if positional is not None and positional not in specs:
        raise AssertionError(f"{cls.__name__} has no field {positional!r} to be positional")
    # argparse would list every flag here: thirty of them say less than the groups below.
    parser.usage = "%(prog)s [options]" + (f" [{positional}]" if positional else "")
    _add_arguments(parser, specs, positional)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        values = vars(parser.parse_args(_normalise(argv, specs, positional)))
        # SUPPRESSed defaults mean that the namespace holds exactly what the user typed, so the
        # defaults stay in one place, the dataclass, and `given` comes for free.
        return cls(**values), frozenset(values)
    except ValueError as error:
        parser.error(str(error))


def apply_preset(options: Options, given: Iterable[str], preset: Mapping[str, Any]) -> Options:
    """A copy of `options` in which every option that was not given takes the preset's value.

    This is how defaults depend on the model: the user's word first, then the model's preset, then
    the dataclass.  A preset key that is no option raises ValueError: it would be a dead setting.
    """
    # Checked first, so that a preset with a typo fails on every machine and not only where the
    # user left that option open.
    names = {field.name for field in dataclasses.fields(options)}
    unknown = sorted(set(preset) - names)
    if unknown:
        raise ValueError(f"preset sets unknown options: {', '.join(unknown)}")
    # By name, not by comparing with the default: `--lr 1e-6` is meant even if 1e-6 is the default.
    changes = {name: value for name, value in preset.items() if name not in set(given)}
    return dataclasses.replace(options, **changes)


def main_guard(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit: 0 or what it returns, 2 for user errors, 1 for a full disk,
    130 for Ctrl-C.

    ValueError and OSError (FileNotFoundError among them) are what this project raises for bad
    input, so they become one `error: ...` line.  Anything else is a bug and keeps its traceback,
    as these do when NANOLASER_TRACEBACK is set in the environment.  Among many processes the death
    of another one is a ConnectionResetError, code 1.
    """
    try:
        code = main()
        # Flushed here, so that a reader who went away is met inside the try.
        sys.stdout.flush()
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
        full = isinstance(error, OSError) and error.errno in _DISK_FULL
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


def near(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that `name` may have been meant to be, the likeliest first."""
    known = list(known)
    # A cut-off name ("--max-new") is a good guess although difflib, which compares whole strings,
    # scores it low.
    longer = [k for k in known if k.startswith(name) and len(name) > 2]
    alike = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    return list(dict.fromkeys(longer + alike))[:count]


@dataclasses.dataclass
class ModelOptions:
    """The options of every script that only uses a model; a script's own ones come after them."""

    model: str = option("tiny", "tiny (embedded), an alias, a hub id, a checkpoint's folder or a "
                                "run's, which means its newest checkpoint", group="model")
    device: str = option("auto", "where to compute", group="model", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of the forward pass; auto: bfloat16 on a GPU, unless the model is "
                                "stored in float32", group="model",
                        choices=("auto", "float32", "bfloat16"))
    z_c: str | None = option(None, "token at which r_s is read", group="model", metavar="TOKEN",
                             by_model=True)
    c_ref: float | None = option(None, "reference log-probability in nats", group="model",
                                 by_model=True)
    beta_v: float | None = option(None, "scale of r_s", group="model", above=0, by_model=True)
    seed: int = option(0, "of the sampling", group="model")


# ---------------------------------------------------------------- from fields to flags


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What one field means on the command line."""

    field: dataclasses.Field
    kind: type      # int, float, str or bool: the type of one value
    many: bool      # a tuple, given as a comma list

    @property
    def flag(self) -> str:
        return "--" + self.field.name.replace("_", "-")

    @property
    def flags(self) -> list[str]:
        # --no-x exists where it can change something: the default is True or decided later.
        if self.kind is bool and self.field.default is not False:
            return [self.flag, "--no-" + self.flag[2:]]
        return [self.flag]

    def get(self, key: str) -> Any:
        return self.field.metadata.get(key)


def _specs(cls: type) -> dict[str, _Spec]:
    """Field name -> spec, in the order of the class, which is the order of --help."""
    # get_type_hints also resolves the strings that `from __future__ import annotations` leaves.
    hints = typing.get_type_hints(cls)
    # What a script is about comes first, what it inherits (ModelOptions) after it.
    own = inspect.get_annotations(cls)
    fields = sorted(dataclasses.fields(cls), key=lambda f: f.name not in own)
    return {f.name: _Spec(f, *_kind(hints[f.name])) for f in fields if f.init}


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether several are taken: `tuple[int, ...]` -> int, True."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        # None is "not given" and str beside a number is there for its `words`; neither decides
        # what is parsed.
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        numbers = [part for part in parts if part is not str]
        return _kind((numbers or parts)[0])
    if typing.get_origin(hint) in (tuple, list):
        return typing.get_args(hint)[0], True
    if hint not in (int, float, str, bool):
        raise AssertionError(f"config.py cannot read options of type {hint}")
    return hint, False


def _add_arguments(parser: argparse.ArgumentParser, specs: Mapping[str, _Spec],
                   positional: str | None) -> None:
    """Give argparse every field, grouped under its heading."""
    # A heading appears where its first field does; later fields of the same group join it there.
    groups: dict[str, Any] = {}
    for name, spec in specs.items():
        heading = spec.get("group") or "options"
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        group = groups[heading]
        text = _help_text(spec)
        if name == positional:
            group.add_argument(name, nargs="?", type=_converter(spec), help=text,
                               metavar=spec.get("metavar") or name, default=argparse.SUPPRESS)
        elif spec.kind is bool:
            _add_switch(group, name, spec, text)
        else:
            group.add_argument(spec.flag, dest=name, type=_converter(spec), help=text,
                               metavar=_metavar(spec), default=argparse.SUPPRESS)
    # Last and in a group of its own: what the script does comes first.
    parser.add_argument_group("help").add_argument(
        "-h", "--help", action="help", help="show this text and exit")


def _add_switch(group: Any, name: str, spec: _Spec, text: str) -> None:
    """A boolean: --x, and --no-x where the default is not off already."""
    for flag in spec.flags:
        turns_on = flag == spec.flag
        # The flag that repeats the default is accepted (scripts like to be explicit) but hidden.
        hidden = turns_on and spec.field.default is True
        group.add_argument(flag, dest=name, action="store_true" if turns_on else "store_false",
                           default=argparse.SUPPRESS,
                           help=argparse.SUPPRESS if hidden else
                           text if turns_on else f"turn off: {text}")


def _help_text(spec: _Spec) -> str:
    """The meaning of an option followed by its default."""
    default = spec.field.default
    if spec.get("shown"):
        shown = spec.get("shown")
    elif default is None and spec.get("by_model"):
        shown = "by model"
    elif default is None or default == "" or default == ():
        shown = "none"
    elif isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, (tuple, list)):
        shown = ",".join(_shown(value) for value in default)
    else:
        shown = _shown(default)
    # argparse runs the text through %-formatting: a plain "95 %" would crash --help.
    return f"{spec.get('help') or ''} (default: {shown})".strip().replace("%", "%%")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metavar(spec: _Spec) -> str:
    if spec.get("metavar"):
        return spec.get("metavar")
    if spec.get("choices"):
        return "{" + ",".join(str(choice) for choice in spec.get("choices")) + "}"
    one = "|".join([*(spec.get("words") or ()), _METAVARS[spec.kind]])
    return one + ",..." if spec.many else one


# ---------------------------------------------------------------- from texts to values


def _converter(spec: _Spec) -> Callable[[str], Any]:
    """The function that turns an option's text into its value, or says why it cannot."""
    # argparse reports an ArgumentTypeError as "argument --x: <our words>" and any other exception
    # as "invalid <function name> value", hence that type throughout.
    def convert(text: str) -> Any:
        if not spec.many:
            return _value(text, spec)
        parts = [part.strip() for part in text.split(",")]
        if "" in parts:
            raise argparse.ArgumentTypeError(f"empty entry in the list {text!r}")
        return tuple(_value(part, spec) for part in parts)

    return convert


def _value(text: str, spec: _Spec) -> Any:
    """One value, checked against the choices and bounds of its option."""
    # Words come before numbers, and as they are: `auto` stays text for the script to resolve.
    if text in (spec.get("words") or ()):
        return text
    try:
        value = spec.kind(text)
    except ValueError:
        value = None
    # "nan" passes every comparison below by failing none of them, so it is refused here.
    if value is None or (spec.kind is float and not math.isfinite(value)):
        wanted = " or ".join([*(spec.get("words") or ()), _TYPE_WORDS[spec.kind]])
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    choices = spec.get("choices")
    if choices and value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise argparse.ArgumentTypeError(f"unknown value {text!r}, choose from {listed}")
    _check_bounds(value, spec)
    return value


def _check_bounds(value: Any, spec: _Spec) -> None:
    low, high, above = spec.get("min"), spec.get("max"), spec.get("above")
    if low is not None and value < low:
        raise argparse.ArgumentTypeError(f"must be at least {_shown(low)}, got {_shown(value)}")
    if above is not None and value <= above:
        raise argparse.ArgumentTypeError(f"must be above {_shown(above)}, got {_shown(value)}")
    if high is not None and value > high:
        raise argparse.ArgumentTypeError(f"must be at most {_shown(high)}, got {_shown(value)}")


# ---------------------------------------------------------------- what argparse would say badly


def _normalise(argv: list[str], specs: Mapping[str, _Spec], positional: str | None) -> list[str]:
    """The command line with every value tied to its flag by "=", or ValueError with the reason.

    argparse takes a value that starts with a dash for a flag, and mathematics is full of them:
    `--gold -1/2`, `--c-ref -2.3e1`.  Tying the two together removes the doubt.
    """
    takes_value = {flag: spec.kind is not bool for name, spec in specs.items()
                   for flag in spec.flags if name != positional}
    counts = {flag: spec.get("count") or 1 for spec in specs.values() for flag in spec.flags}
    tied, loose, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, _ = word.partition("=")
        if word == "--":                                   # all that follows is plain text
            loose, rest = loose + rest, []
        elif word in ("-h", "--help"):
            tied.append(word)
        elif word == "-" or not word.startswith("-"):      # "-" alone stands for standard input
            loose.append(word)
        elif flag not in takes_value:
            raise ValueError(_unknown(flag, takes_value, positional))
        elif equals and not takes_value[flag]:
            raise ValueError(f"{flag} takes no value")
        elif equals or not takes_value[flag]:
            tied.append(word)
        elif not rest or rest[0].startswith("--"):
            # One dash may begin a value, two are far likelier the next flag.
            raise ValueError(f"{flag} needs a value")
        else:
            values = [rest.pop(0)]
            # argparse takes one word after "=": several are handed on as the comma list they mean
            while len(values) < counts[flag] and rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            tied.append(f"{flag}={','.join(values)}")
    # Too many words are nearly always one text whose quotes were forgotten: 2 + 3 = ?
    allowed = 0 if positional is None else 1
    if len(loose) > allowed:
        hint = "quote a text that has spaces" if allowed else "options start with --"
        raise ValueError(f"unexpected argument {loose[allowed]!r}; {hint}")
    return tied + (["--", *loose] if loose else [])


def _unknown(flag: str, known: Iterable[str], positional: str | None) -> str:
    """What to say about a flag that does not exist."""
    # --max_new_tokens is the Python name of an option: the guess should find the dashed one.
    guesses = near(flag.replace("_", "-"), [*known, "--help"])
    if guesses:
        return f"unknown option {flag}; did you mean {' or '.join(guesses)}?"
    if positional is not None and not flag.startswith("--"):
        return f"unknown option {flag}; put -- before a {positional} that starts with a dash"
    return f"unknown option {flag}; --help lists them all"


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors in place of its usage dump."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.removeprefix("argument ").split())
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def _formatter(prog: str) -> argparse.HelpFormatter:
    # A fixed width: the same text in a narrow terminal, a pipe and the README.
    return argparse.HelpFormatter(prog, max_help_position=34, width=100)


def _one_line(error: BaseException) -> str:
    """An exception as one line without Python's decoration."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"       # not "[Errno 2] ...: 'name'"
    return " ".join(str(error).split()) or type(error).__name__
