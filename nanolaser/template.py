"""
Chat templates: programs that come with a model, written by whoever published it, run on every
problem.  They are run, for a model asked in other words than it was trained on is another model;
but they can neither leave their sandbox nor take more time or memory than a prompt is worth.

    render = compile_template("{{ bos_token }}{% for m in messages %}...", {"bos_token": "<s>"})
    render("What is 2+3?")

The way out is jinja2's matter (no attribute that leads to the interpreter, nothing to modify); how
much is ours.  One rule bounds it: every pass of a loop, call, filter and operator costs a step,
more where it handles long texts, and no value may be longer than LENGTH.  So there is no need to
think of all that could hang or fill the memory.  The rule is put into the template when it is
compiled (_Measured), so it slows a prompt by microseconds and needs no clock and no second process.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

STEPS = 100_000  # of one prompt; those of published models take 10 to 300
LENGTH = 100_000  # characters of any value as it would be written out, beside the problem's own
LARGE = 10_000  # no whole number above it is handed to anything: range(10**9), 'x'.center(10**12)
PRODUCT = 100_000_000  # of the lengths handed to one call: 'xxx...'.replace('x', 'yyy...')
FORMAT = "it formats a text by a pattern, which may ask for any width"
SOURCE = 1_000_000  # characters of the template itself; the longest published one has 30,000


def compile_template(source: str, names: dict[str, str]) -> Callable[[str], str]:
    """A function from a problem's text to the prompt: one user turn, up to where the assistant's
    begins.  `names` are what the template may refer to ({"bos_token": "<s>"}).

    ValueError, one line, if the source is no valid template; from the function, if the template
    fails, be it by mistake, refused by the sandbox, or beyond its bounds.
    """
    # 1. Compiled once, into Python, when the model is loaded.  SyntaxError and MemoryError are
    #    Python's own compiler's, for blocks nested too deeply.
    environment = _Environment()
    try:
        if len(source) > SOURCE:
            raise SecurityError(f"it has {len(source)} characters")
        template = environment.from_string(source)
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the chat template is not valid: {_said(error)}") from None

    def render(content: str) -> str:
        """The prompt of one problem."""
        # 2. Run for each problem, with a full purse; a long one may cost more.
        n = len(content)
        environment.steps, environment.length = STEPS + 100 * n, LENGTH + 10 * n
        try:
            return template.render(
                messages=[{"role": "user", "content": content}], add_generation_prompt=True,
                tools=None, documents=None, **names,
            )  # fmt: skip
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, AttributeError,
                ValueError, RecursionError, MemoryError) as error:  # fmt: skip
            raise ValueError(f"the chat template failed: {_said(error)}") from None

    return render


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, and in it a purse that every operation draws on."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self):
        # The white-space settings and the extra names are those that templates are written for.
        # optimized=False: constants would be computed while compiling, 'x' * 10**12 among them.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False,
                         extensions=[_Generation, loopcontrols])  # fmt: skip
        self.steps, self.length = STEPS, LENGTH
        self.filters["tojson"] = _tojson
        del self.filters["format"], self.globals["lipsum"]
        for name, filter_ in self.filters.items():
            self.filters[name] = functools.wraps(filter_)(functools.partial(self.guarded, filter_))
        # pass_context: what needs the context is never computed while compiling
        self.filters["_measured"] = jinja2.pass_context(lambda _, value: self.measured(value))
        self.filters["_each"] = jinja2.pass_context(lambda _, values: self.each(values))
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        # jinja2's door for whoever changes a template between parser and compiler
        return _Measured().visit(super()._parse(source, name, filename))

    def spend(self, *values: Any) -> list[int]:
        """Pay for an operation on these values: returns their lengths; SecurityError (a
        TemplateError) if one is too long, or the purse is empty."""
        # An operation on small things costs 1, one on a text of 9,000 characters 901: so sorting
        # it ten thousand times is over after a hundred.
        sizes = [self.size(value) for value in values]
        self.steps -= 1 + sum(sizes) // 10
        if self.steps < 0:
            raise SecurityError("it does too much for a prompt")
        return sizes

    def size(self, value: Any) -> int:
        """About how many characters a value would have if it was written out."""
        # Not recursive, and over as soon as it is too much: [[[x, x], [x, x]], ...] of the same x
        # holds 2**60 of it after sixty rounds, though each round makes one list of two.
        total, left = 0, [value]
        while left:
            part = left.pop()
            total += len(part) if isinstance(part, str) else 1
            if isinstance(part, int):
                total += part.bit_length() // 3
            elif isinstance(part, (list, tuple)):
                left += part
            elif isinstance(part, dict):
                left += [*part.keys(), *part.values()]
            self.allow(total)
        return total

    def allow(self, length: int) -> None:
        """SecurityError for a length that no value in a prompt has."""
        if length > self.length:
            raise SecurityError(f"it makes a text or list of over {self.length} characters")

    def measured(self, value: Any) -> Any:
        """The value, if it is not too long."""
        self.spend(value)
        return value

    def each(self, values: Iterable) -> Iterator:
        """The values that a loop goes over; each pass is paid for."""
        for value in values:
            self.spend()
            yield value

    def guarded(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, if neither that nor what it is given is too much."""
        # Before, for what a function makes of small arguments is known only when it is there:
        # 90,000 x's, each replaced by 90,000 y's, are refused by the product of the lengths, and
        # range(10**9) by its number.  Afterwards, for all else: the result is measured.
        values = [*args, *kwargs.values()]
        if math.prod(max(1, size) for size in self.spend(*values)) > PRODUCT:
            raise SecurityError("it handles too much for a prompt")
        if any(isinstance(value, int) and abs(value) > LARGE for value in values):
            raise SecurityError(f"it asks for more than {LARGE} of something")
        return self.measured(function(*args, **kwargs))

    def call(self, context: Any, function: Callable, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template comes by here, macros included."""
        if getattr(function, "__name__", "") in ("format", "format_map"):
            raise SecurityError(FORMAT)  # '{:1000000000}'.format(1)
        # jinja2's own notes for the callee; what the template hands over is the rest
        notes = {k: kwargs.pop(k) for k in ("_loop_vars", "_block_vars") if k in kwargs}
        owner = getattr(function, "__self__", None)  # 'xxx...'.replace('x', ...) handles it as well
        this = functools.partial(super().call, context, function, **notes)
        return self.guarded(lambda _, *a, **k: this(*a, **k),
                            owner if isinstance(owner, (str, dict)) else None, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Every operator comes by here: + - * / // % **."""
        sizes = self.spend(left, right)
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "*" and not numbers:  # 'x' * 10**12: as long as the one, so many times
            times, size = (left, sizes[1]) if isinstance(left, int) else (right, sizes[0])
            self.allow(size * times)
        if operator == "**" and not (numbers and abs(right) <= 100 and sizes[0] <= 100):
            raise SecurityError("it takes too large a power")
        if operator == "%" and isinstance(left, str):
            raise SecurityError(FORMAT)  # '%1000000000d' % 1
        return self.measured(super().call_binop(context, operator, left, right))


class _Measured(NodeTransformer):
    """Puts the filters _each and _measured where a template loops, writes, joins with ~ and makes
    lists; calls, filters and operators come by _Environment as it is."""

    #     {% for m in messages %}{{ m.role ~ m.content }}{% endfor %}      becomes
    #     {% for m in messages | _each %}{{ ((m.role | _measured) ~ (m.content | _measured)) |
    #     _measured }}{% endfor %}

    def visit_For(self, node: nodes.For) -> nodes.For:
        node = self.generic_visit(node)
        node.iter = _filtered(node.iter, "_each")
        return node

    def visit_Output(self, node: nodes.Output | nodes.Concat) -> nodes.Node:
        node = self.generic_visit(node)
        plain = nodes.TemplateData  # the template's own text
        node.nodes = [n if isinstance(n, plain) else _filtered(n, "_measured") for n in node.nodes]
        return node

    visit_Concat = visit_Output

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        node = self.generic_visit(node)
        loaded = getattr(node, "ctx", "load") == "load"  # not {% for key, value in ... %}
        return _filtered(node, "_measured") if loaded else node

    visit_Tuple = visit_Dict = visit_List


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    new = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
    new.set_environment(node.environment)
    return new


class _Generation(Extension):
    """{% generation %} marks the assistant's words in some templates: render what it holds."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)  # the tag's own name
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    # Some templates write today's date into the prompt.  A run that goes on over midnight would
    # read other prompts, so it is always the day that Llama's templates fall back to.
    return datetime.date(2024, 7, 26).strftime(pattern)


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    # jinja2's own filter escapes < > & for web pages; the model should see the characters
    return json.dumps(value, ensure_ascii=False, indent=indent)
