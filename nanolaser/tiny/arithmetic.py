"""
Arithmetic made up on the spot, such as (14+25)*2-9=?: the problems of the embedded model.

An expression is a number, or a tuple (operator, left, right): (14+25)*2-9 is

    ("-", ("*", ("+", 14, 25), 2), 9)

All values on the way lie in 0..999, and a product has one factor below 10: steps that a model of a
million parameters can do in one go.  So what it gets wrong is how it got there.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
LARGEST = 999  # of any value on the way
OPERAND = 30  # largest number in a problem


def arithmetic_value(expression) -> int:
    """The value of an expression (a number, or a tuple of operator, left, right)."""
    if isinstance(expression, int):
        return expression
    operator, left, right = expression
    return OPERATORS[operator](arithmetic_value(left), arithmetic_value(right))


def arithmetic_text(expression) -> str:
    """The expression as one writes it, with no parenthesis more than needed."""
    if isinstance(expression, int):
        return str(expression)
    operator, left, right = expression
    # A product of sums needs parentheses, (14+25)*2; a sum of products none, 14*2+9.
    weak = lambda e: not isinstance(e, int) and e[0] in "+-"  # noqa: E731
    wrap = lambda e, on: f"({arithmetic_text(e)})" if on else arithmetic_text(e)  # noqa: E731
    # a-(b+c) and a*(b*c) keep theirs: operators of one rank are read from the left
    tight = not isinstance(right, int) and (weak(right) or operator == "*")
    return wrap(left, operator == "*" and weak(left)) + operator + wrap(right, tight)


def arithmetic_expression(rng: random.Random, operations: int):
    """A random expression of so many operations whose values all stay in bounds."""
    while True:
        try:
            return _grow(rng, operations)
        except OverflowError:
            continue  # some value out of bounds: draw a new one


def _grow(rng: random.Random, operations: int):
    if operations == 0:
        return rng.randint(1, OPERAND)
    # leaning to the left, as people write sums: 3+4*5-6 more often than deep brackets
    on_left = rng.choice((0, operations - 1, operations - 1, rng.randint(0, operations - 1)))
    left, right = _grow(rng, on_left), _grow(rng, operations - 1 - on_left)
    operator, a, b = rng.choice("+-*"), arithmetic_value(left), arithmetic_value(right)
    # Refused as a whole, not mended: a second draw of the operator alone would make some operators
    # rarer at the top of an expression than below it.
    value = OPERATORS[operator](a, b)
    if not 0 <= value <= LARGEST or (operator == "*" and min(a, b) > 9):
        raise OverflowError
    return operator, left, right


def is_held_out(text: str) -> bool:
    """Every eighth expression, by a checksum of its text, belongs to the test split: no training,
    of the embedded model or on it, ever sees one."""
    # By the text and not by a seed: nobody has to remember which problems were drawn.
    return zlib.crc32(text.encode()) % 8 == 0


def made_up(seed: int, split: str, operations: tuple[int, ...]) -> Iterator[tuple[str, str, int]]:
    """Endless (problem, answer, number of operations) of the split (train, test): the same seed
    gives the same ones."""
    rng = random.Random(f"{split} {seed}")
    while True:
        # Whole problems are thrown away, seven of eight for the test split: they cost microseconds.
        n = rng.choice(operations)
        expression = arithmetic_expression(rng, n)
        text = arithmetic_text(expression)
        if is_held_out(text) == (split == "test"):
            yield f"{text}=?", str(arithmetic_value(expression)), n
