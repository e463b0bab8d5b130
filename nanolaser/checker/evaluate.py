r"""The value of an answer's expression: exact where it can be, with an error bound where it cannot.

Reading order: the letters of an expression and the points at which two expressions are compared;
numbers (int and Fraction are exact, a Ball is a complex number with an error bound); equality of
two values at one point; then the Evaluator, one method a kind of node.
"""

# No float anywhere in a verdict: a float has 16 digits, so 1 + 10^-17 would "equal" 1. Fraction is
# exact, and Decimal has as many digits as are asked for.
import decimal
import math
from binascii import crc32
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from .parse import is_structure, parse

# Every bound below is a wall against slow inputs (a model under RL finds them by accident), and far
# above what a benchmark answer needs. To meet one is an unequal verdict, never an exception: one
# rollout's reward must not be able to stop a training run. All of MAX_WORK is spent in about a
# hundredth of a second, so a step with a thousand hostile answers loses seconds, not hours.
MAX_WORK = 15000         # unit: about one microsecond of work on a laptop core
MAX_BITS = 32000         # of an exact numerator or denominator (about 9600 digits)
# 3000! has 30332 bits, just below MAX_BITS: nothing longer could be computed with any further.
MAX_FACTORIAL = 3000     # of the argument of an exact factorial
MAX_SUM_TERMS = 2000
# `agree` wants 25 digits in common; fifty leave as many for rounding errors and cancellation. The
# cap of 1000 lets an answer hold 10^-900, and stops one that holds 10^-100000.
FIRST_PRECISION = 50     # digits
MAX_PRECISION = 1000
MAX_REAL_ROOT = 100      # (-8)^(1/3) is -2; denominators at random points rarely are so low


class CannotDecide(ValueError):
    """A limit was met, or a point where an expression has no value; the message names it."""


class NoValue(CannotDecide):
    """The answer has no value, or none that can be computed, where the gold has one."""


# ---------------------------------------------------------------------------------------------
# Letters and the points where expressions are compared

_WHOLE = {"fact", "fact2", "binom"}  # what stands in these is a whole number
_INTEGER_LETTERS = set("ijklmnpqdrstNMKLT")  # in a floor or above -1, these mean whole numbers


def letters_of(node) -> set:
    """The free letters of an expression."""
    # A name counts whole: x_1 and x_2 are two letters, and the index is no letter by itself.
    kind = node[0] if node else ""
    if kind == "sym":
        return {node[1]}
    found: set = set()
    # A child is a node or a tuple of nodes, such as add's terms; both are walked alike.
    for part in node:
        if isinstance(part, tuple):
            found |= letters_of(part)
    # The k of a sum is bound: given a value from outside, sum k and sum j would differ.
    if kind in ("sum", "prod"):
        found.discard(node[1])
    return found


def nodes(tree):
    """Every node of a tree, the tree itself first."""
    stack = [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, tuple):
            if part and isinstance(part[0], str):
                yield part
            stack.extend(part)


def _counted(tree: tuple) -> set:
    """The letters that stand for whole numbers: n! and floor(n/2) and (-1)^n are only meant so."""
    found = set()
    for node in nodes(tree):
        # Only sure cases are whole for any name: x! has no other value here, gcd(a,b) neither.
        if node[0] in _WHOLE or node[0] == "fn" and node[1] in ("gcd", "lcm"):
            found |= letters_of(node)
        elif node[0] in ("sum", "prod"):
            found |= letters_of(node[2]) | letters_of(node[3])
        # floor(x) stays a function of real x: at whole x alone it would be equal to x.
        #   (-1)^n: at n = 1234/5678 it would be complex, and (-1)^(2n) = 1 would be denied
        elif node[0] in ("floor", "ceil") or (
                node[0] == "pow" and node[1][0] == "neg" and not letters_of(node[1])):
            found |= {name for name in letters_of(node[-1]) if name[0] in _INTEGER_LETTERS}
    return found


def _hash(text: str, salt: int) -> int:
    """Fixed pseudo-random 32 bits; Python's own hash changes from run to run."""
    # Fixed, so that a verdict never changes between two runs, machines or processes.
    # A model cannot aim at the points: an expression equal to gold at all of them is
    # as hard to find as the answer.
    return crc32(f"{salt}:{text}:{salt * 7919}".encode())


_BRANCHING = {"abs", "floor", "ceil", "root", "log"}
_SMOOTH = {"sin", "cos", "tan", "cot", "sec", "csc", "cis", "sinh", "cosh", "tanh", "coth"}


def _branches(tree: tuple, smooth: set = _SMOOTH) -> bool:
    """Could the expression follow different rules on different stretches of a letter?"""
    # |x|, floor(x), sqrt(x^2), max(x, 20), arcsin(sin x); x^{1/2} and x^y, but not x^3 and 2^x.
    return any((node[0] in _BRANCHING or node[0] == "fn" and node[1] not in smooth) and (
        letters_of(node)) or node[0] == "pow" and letters_of(node[1]) and not (
            node[2][0] == "num" and node[2][1].denominator == 1) for node in nodes(tree))


def _constants(trees: tuple, work: "Work") -> list:
    """The sizes of numbers that stand in the expressions: where their branches can begin."""
    #   |x/600 - 2^{10}|  ->  600, 1/600, 2^{10}, 2, 10; eight are enough for any answer
    found: list = []
    for node in (node for tree in trees for node in nodes(tree)):
        if len(found) < 8 and not is_structure(node) and not letters_of(node):
            try:
                value = Evaluator({}, FIRST_PRECISION, work).value(node)
            except CannotDecide:
                continue
            # Only what is of ordinary size becomes a fraction: e^{10^9} would have 10^8 digits.
            if isinstance(value, Ball):
                value = Fraction(value.re) if abs(value.re.adjusted()) < 12 else 0
            if 0 < abs(value) < 10 ** 12 and abs(value) not in found:
                found.append(abs(value))
    return found


def _near(value) -> Fraction:
    """A number close by with one fixed prime below the line: short in exact arithmetic.

    An odd denominator below MAX_REAL_ROOT would make x^a a real root where x^a x^b is none.
    """
    return Fraction(int(value * 10007) | 1, 10007)


def _stretches(constants: list) -> list:
    """One number of either sign in each stretch between the constants, and beyond them all."""
    #   constants 20 and 21  ->  something in (0, 20), (20, 21), beyond 21, beyond 2 * 20 * 21
    beyond = 2 * math.prod(max(c, 1 / Fraction(c)) for c in constants)
    marks = [Fraction(0), *sorted(constants)]
    inside = [low + (high - low) * Fraction(377, 1000) for low, high in zip(marks, marks[1:])]
    inside += [Fraction(1377, 1000) * c for c in (marks[-1] or 1, min(beyond, 10 ** 12))]
    return [_near(sign * value) for value in inside for sign in (1, -1)]


def points_for(answer: tuple, gold: tuple, work: "Work") -> tuple[list[dict], set]:
    """(where to compare, the letters that are whole there): rationals of both signs and several
    sizes; whole numbers for letters that count.

    The gold decides what counts: 0 x! in an answer must not make x a positive whole number, where
    x and |x| are the same. Only a letter that is whole by custom, such as n, may be counted with
    by an answer, and only where nothing on either side depends on its sign or its fraction.
    """
    letters = sorted(letters_of(answer) | letters_of(gold))
    branching = _branches(gold) or _branches(answer)
    whole = _counted(gold)
    if not branching and not _branches(gold, set()):
        whole |= {name for name in _counted(answer) if name[0] in _INTEGER_LETTERS}
    whole.intersection_update(letters)
    # Four points for smooth expressions; more where there are branches; twenty where something is
    # counted: floor(sqrt(n)) and floor(n/2) agree at n = 2, 3, 4 and 5, and part only then.
    count = 20 if whole else 8 if branching else 4
    points: list[dict] = []
    for k in range(count):
        point = {}
        for j, name in enumerate(letters):
            bits = _hash(name, k)
            # Both signs as often for every letter, and in all four pairs for two of them: the
            # parity of (j + 1) & k is the j-th Walsh function.
            #   j = 0: + - + -     j = 1: + + - -     j = 2: + - - +
            sign = -1 if ((j % 3 + 1) & k).bit_count() & 1 else 1
            if name in whole:
                # One letter takes all small values and some large: floors differ at few of them.
                # A fixed ladder rather than random: 1 to 16, then powers and squares,
                # where floors and roots step.
                single = k + 1 if k < 16 else (25, 32, 64, 100)[k - 16]
                # Several counting letters: small, since n! and binomials grow fast,
                # and 15 keeps them cheap.
                point[name] = single if len(whole) == 1 else 1 + bits % 15
            else:
                # About 0.1 to 10, never 0 or 1, where x and x^2 would meet. Where there are
                # branches, other sizes too, each letter in its turn.
                size = Fraction(1000 + bits % 8999, 1000 + (bits >> 13) % 8999)
                if count == 8 and k >= 4:
                    size *= (40, Fraction(1, 50), 2000)[(k + j) % 3]
                point[name] = _near(sign * size)
        points.append(point)
    if whole or branching:
        # floor(x) and ceil(x) - 1 differ at whole numbers only.
        points += [{name: round(value) or 1 for name, value in point.items()}
                   for point in points[:8]]
        constants = _constants((gold, answer), work)
        # Each letter passes through its stretches while the others stand still.
        for name in letters[:4]:
            stretches = _stretches(constants)
            if name in whole:
                stretches = {int(c) + d for c in (*constants, stretches[-2]) for d in (0, 1)
                             if 15 < c < 10 ** 9}
            points += [{**points[k % 4], name: value} for k, value in enumerate(stretches)]
    return points, whole


# ---------------------------------------------------------------------------------------------
# Numbers: int and Fraction are exact; a Ball is a complex number with an error bound

class Work:
    """A budget shared by all that one comparison does, so that no input can take long."""

    def __init__(self):
        # One number for all kinds of cost. A wall clock would do too, but its verdicts would depend
        # on how busy the machine is, and a run could not be repeated.
        self.left = MAX_WORK

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            # Callers charge before they compute, so work that is too much is never started.
            raise CannotDecide("too much work")


class Ball(NamedTuple):
    """A complex number known to within err (an absolute bound on |error|); im is 0 if real."""
    # One bound for both parts: |true re - re| <= err and |true im - im| <= err. A value without im
    # is a real ball in practice, so that signs, floors and real roots can be told.
    re: Decimal
    im: Decimal
    err: Decimal

    def size(self) -> Decimal:
        """An upper bound of the absolute value."""
        # |re| + |im| is at least the modulus and needs no square root;
        # max(|re|, |im|) is at most that.
        return abs(self.re) + abs(self.im)

    def floor_size(self) -> Decimal:
        """A lower bound of the absolute value of the centre."""
        return max(abs(self.re), abs(self.im))

    def is_real(self) -> bool:
        return abs(self.im) <= self.err

    def is_null(self) -> bool:
        """Could it be zero?"""
        # Could be, not is: sqrt(2)^2 - 2 has a centre of 1e-49 or so and must not be divided by.
        return self.floor_size() <= self.err


_ZERO, _ONE, _TWO = Decimal(0), Decimal(1), Decimal(2)


def is_zero(value) -> bool:
    """Is it zero, or, if inexact, could it be?"""
    return value.is_null() if isinstance(value, Ball) else value == 0


def agree(one, other) -> bool:
    """Do two values coincide, exactly or within their error bounds?"""
    # Two exact values: nothing is rounded and no doubt is left. This decides most benchmark pairs.
    if not isinstance(one, Ball) and not isinstance(other, Ball):
        return one == other
    context = decimal.getcontext()
    one, other = _ball(one, context), _ball(other, context)
    bound = one.err + other.err
    # Further apart than both errors together: a proof that they differ, whatever the precision.
    if abs(one.re - other.re) > bound or abs(one.im - other.im) > bound:
        return False
    #   1 +- 5 against 3 +- 5: they overlap, and nothing is known
    # Wide balls agree with anything: that is no evidence.
    # One is certainly not zero, the other could be: nothing is known either.
    if one.is_null() != other.is_null():
        raise CannotDecide("not enough digits left")
    # Twenty-five digits must be certain. The floor of 1e-20 is for values that are zero on both
    # sides, where no digit can ever be certain: |x| < 1e-45 counts as zero then.
    if bound > max(one.floor_size(), other.floor_size(), Decimal("1e-20")) * Decimal("1e-25"):
        raise CannotDecide("not enough digits left")
    return True


def _ball(value, context: decimal.Context) -> Ball:
    """An exact number as a ball: its error is one unit of the last digit."""
    if isinstance(value, Ball):
        return value
    # One correctly rounded division; an error of a whole last digit is a safe bound for its half.
    quotient = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    return Ball(quotient, _ZERO, abs(quotient).scaleb(1 - context.prec, context))


def equal_at(point: dict, answer: tuple, gold: tuple, work: Work) -> tuple[bool, bool]:
    """(equal, exactly) at one point, with as many digits as it takes; raises CannotDecide."""
    # At most two or three rounds: cheap digits first, more only where `need` asks for them.
    precision = FIRST_PRECISION
    while True:
        evaluator = Evaluator(point, precision, work)
        gold_known = False
        try:
            other = evaluator.value(gold)
            gold_known = True
            one = evaluator.value(answer)
            exact = not isinstance(one, Ball) and not isinstance(other, Ball)
            with decimal.localcontext(evaluator.context):
                if not exact:
                    one, other = evaluator.ball(one), evaluator.ball(other)
                # Different at any precision is final, since the balls hold the true values.
                if not agree(one, other):
                    return False, exact
            # Equal is only believed when nothing written in the answers lies below the last digit
            # kept, also where a floor or an unknown function made an exact number of it.
            #   1 + 10^-80 pi against 1: equal at 50 digits, need = 100, unequal at 120
            if evaluator.need <= precision:
                return True, exact
        except CannotDecide as error:
            # More digits may help where something asked for them.
            if work.left < 0 or evaluator.need <= precision:
                if gold_known:
                    raise NoValue(str(error)) from None
                raise
        precision = evaluator.need + 20
        if precision > MAX_PRECISION:
            raise CannotDecide(f"more than {MAX_PRECISION} digits would be needed")


def rounds_to(answer: tuple, gold: tuple, work: Work) -> bool:
    """Is one side a written decimal, the other an exact number that rounds to it at six places?

    Only where the exact number is no decimal of six places itself: 0.9999999 is not 1.
    """
    decimals = [_decimal_places(answer), _decimal_places(gold)]
    # Two decimals: both were written to say what they say. None: there is nothing to round.
    if (decimals[0] is None) == (decimals[1] is None):
        return False
    written, exact = (answer, gold) if decimals[0] is not None else (gold, answer)
    # Six decimals are a policy, common among graders: with fewer, 0.33 would pass for 1/3.
    if max(d for d in decimals if d is not None) < 6:
        return False
    evaluator = Evaluator({}, FIRST_PRECISION, work)
    value, rounded = evaluator.value(exact), evaluator.value(written)
    if isinstance(value, Ball):
        # In the evaluator's context, where the exponent of e^{10^9} does not overflow; and no
        # such number becomes a fraction, which would have 10^8 digits.
        with decimal.localcontext(evaluator.context):
            if not value.is_real() or abs(value.re.adjusted()) > 30:
                return False
        # 50 digits of a root are plenty for a rounding at the sixth place.
        value = Fraction(value.re)
    million = 10 ** 6
    #   gold 1/4 is 0.250000 itself: a decimal that differs from it is wrong and not rounded
    if (value * million).denominator == 1:
        return False
    # The second test wants four figures to agree: 0.000002 has six decimals but one figure, and
    # would otherwise pass for any number that rounds to 0.000002.
    return (round(value * million) == round(rounded * million)
            and abs(value - rounded) * 10 ** 4 <= abs(value))


def _decimal_places(node: tuple) -> int | None:
    """Digits after the point of a written decimal, of either sign; None for others."""
    #   -0.50 -> 2       1/2 -> None       pi -> None
    if node[0] == "neg":
        return _decimal_places(node[1])
    return node[2] if node[0] == "num" else None


# The same few precisions come again and again; a cache of 64 is small and cannot grow.
@lru_cache(maxsize=64)
def _pi(precision: int) -> Decimal:
    """Pi to `precision` digits by Machin's formula in whole numbers."""
    # Ten guard digits: some hundreds of truncated divisions lose four at most.
    scale = 10 ** (precision + 10)

    def arctan_inverse(n: int) -> int:
        term = total = scale // n
        k = 1
        while term:
            term //= -n * n
            k += 2
            total += term // k
        return total

    # pi = 16 arctan(1/5) - 4 arctan(1/239); whole numbers, so there is no
    # rounding to keep track of.
    return Decimal(4 * (4 * arctan_inverse(5) - arctan_inverse(239))).scaleb(-precision - 10)


class Evaluator:
    """The value of an expression at one point, to one precision.

    `need` grows to the number of digits below which something written would go unseen: an addend
    too small for the digits kept, or a fraction with more digits than that.
    """

    def __init__(self, point: dict, precision: int, work: Work):
        # One evaluator per point and precision: it remembers `need` and nothing of other points.
        self.point, self.precision, self.work, self.need = point, precision, work, 0
        # Are we inside a sine or the like? Only there does a degree sign mean pi/180.
        self.in_trig = False
        self.angles: dict = {}  # angle -> (cos, sin), since a tangent asks four times
        # Under- and overflow must not pass silently as 0 and infinity.
        # Widest exponents, so that 10^-900 stays a number, and traps instead of quiet infinities or
        # NaNs: a NaN that compared equal to something would be a reward for nonsense.
        self.context = decimal.Context(
            prec=precision, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN,
            traps=[decimal.Overflow, decimal.Underflow, decimal.InvalidOperation,
                   decimal.DivisionByZero])

    def value(self, node: tuple):
        """int, Fraction or Ball; raises CannotDecide where there is no value or no room."""
        with decimal.localcontext(self.context):
            try:
                return self.evaluate(node)
            except (decimal.DecimalException, OverflowError):
                # All arithmetic failures leave by this one door, as the one
                # exception that the callers know.
                raise CannotDecide("a number too large or too small") from None

    def evaluate(self, node: tuple):
        self.work.spend(1)
        # The tree comes from the parser, whose kinds are a closed list: no text picks a method.
        method = getattr(self, "do_" + node[0], None)
        if method is None:
            raise CannotDecide("arithmetic on something that is not a number")
        return method(*node[1:])

    # -- arithmetic ---------------------------------------------------------------------------
    def ball(self, value) -> Ball:
        """An exact number as a ball, remembering how many digits it takes to tell it apart."""
        if isinstance(value, Ball):
            return value
        digits = (value.numerator.bit_length() + value.denominator.bit_length()) * 0.302
        # At a random point long fractions are made by the point, not written by anyone. 20 digits
        # beyond its own length tell the fraction from every other that could be written so. The cap
        # keeps a power at a random point, of thousands of digits, from asking for thousands.
        self.need = max(self.need, min(int(digits) + 20, 300) if self.point else int(digits) + 20)
        # Quadratic, as a long division is.
        self.work.spend(2 + int(digits * digits) // 20000)
        return _ball(value, self.context)

    def ulp(self, size: Decimal) -> Decimal:
        """The rounding error allowed for a result of this size: four units of the last digit."""
        # Four and not one: a result is made of up to four roundings (complex products), and a bound
        # that is too wide costs a second round at worst, one too narrow a wrong verdict.
        return size.scaleb(1 - self.precision) * 4

    def checked(self, value):
        """An exact result, if it is not too long to go on with."""
        if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
            raise CannotDecide("a fraction with too many digits")
        return value

    def add(self, one, other):
        """Exact, or with both errors and one rounding."""
        if not isinstance(one, Ball) and not isinstance(other, Ball):
            # The cost of an exact sum is that of its common denominator.
            self.work.spend(1 + one.denominator.bit_length() // 200)
            return self.checked(one + other)
        one, other = self.ball(one), self.ball(other)
        self.work.spend(4)
        #   1 + 10^-80 pi: the exponents are 80 apart, so 100 digits are needed to see the addend
        if not one.is_null() and not other.is_null():
            # Zero is left out: it has no exponent, and adding it hides nothing.
            gap = abs(one.floor_size().adjusted() - other.floor_size().adjusted())
            self.need = max(self.need, gap + 20)  # the smaller addend must stay visible
        re, im = one.re + other.re, one.im + other.im
        return Ball(re, im, one.err + other.err + self.ulp(abs(re) + abs(im)))

    def neg(self, value):
        """Negation makes no error."""
        return Ball(-value.re, -value.im, value.err) if isinstance(value, Ball) else -value

    def mul(self, one, other):
        """Exact, or with the error |a| eb + |b| ea + ea eb and one rounding."""
        if not isinstance(one, Ball) and not isinstance(other, Ball):
            bits = one.numerator.bit_length() + other.numerator.bit_length()
            self.work.spend(1 + bits // 200)
            return self.checked(one * other)
        # An exact zero wipes out any error. Otherwise 0 * pi would be a ball around zero, and 0 *
        # pi = 0 needed a limit to be decided.
        if _is_exact_zero(one) or _is_exact_zero(other):
            return 0
        one, other = self.ball(one), self.ball(other)
        self.work.spend(3 + self.precision // 100)
        if one.im or other.im:
            re = one.re * other.re - one.im * other.im
            im = one.re * other.im + one.im * other.re
        else:
            # Kept apart, so that reals stay real: an im of 1e-50 would take
            # sqrt off the real branch.
            re, im = one.re * other.re, _ZERO
        size, other_size = one.size(), other.size()
        return Ball(re, im, size * other.err + other_size * one.err + one.err * other.err
                    + self.ulp(size * other_size))

    def inverse(self, value):
        """1/z; its error is at most e / (|z| - e)^2. Refuses what could be zero."""
        if not isinstance(value, Ball):
            if value == 0:
                raise CannotDecide("a division by zero")
            return 1 / Fraction(value)
        # The factor 2 covers that err bounds each part of a complex number, not its modulus.
        low = value.floor_size() - 2 * value.err
        if low <= 0:
            raise CannotDecide("a division by zero")
        self.work.spend(6 + self.precision // 50)
        if not value.im:
            re, im = _ONE / value.re, _ZERO
        else:
            #   1/(a + bi) = (a - bi)/(a^2 + b^2)
            norm = value.re * value.re + value.im * value.im
            re, im = value.re / norm, -value.im / norm
        return Ball(re, im, 2 * value.err / (low * low) + self.ulp(2 / low))

    def real(self, value: Ball) -> Ball:
        """Drop an imaginary part that is within the error: roots of -1+0i must not pick a side."""
        # The part that is dropped was no larger than err, so twice err covers both.
        return Ball(value.re, _ZERO, 2 * value.err) if value.im and value.is_real() else value

    # -- powers, exponentials, logarithms -----------------------------------------------------
    def power(self, base, exponent):
        """base^exponent: whole, then rational, then exp(exponent log base) on the main branch."""
        if isinstance(exponent, Ball):
            # An exponent such as i * i has im 0 within error and is meant as the real number -1.
            exponent = self.real(exponent)
        elif exponent.denominator == 1:
            return self.integer_power(base, int(exponent))
        if is_zero(base):
            # 0^0 and 0^-1 have no value. Around a zero that is not exact, nothing is known.
            if isinstance(base, Ball) or isinstance(exponent, Ball) or exponent <= 0:
                raise CannotDecide("a power of zero")
            return 0
        if not isinstance(exponent, Ball):
            return self.rational_power(base, exponent)
        # The main branch for everything else: i^i = exp(i log i) = exp(-pi/2).
        return self.exp(self.mul(exponent, self.log(base)))

    def integer_power(self, base, n: int):
        """Exact while the digits last, then by repeated squaring with error bounds."""
        # Even 0^0 = 1 is refused: conventions differ, and a tree equal to the
        # gold's was accepted before.
        if is_zero(base) and n <= 0:
            raise CannotDecide("a power of zero")
        if n < 0:
            return self.inverse(self.integer_power(base, -n))
        if not isinstance(base, Ball):
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            # (-1)^(10^30) is one by the parity of its exponent, without a single product.
            if base in (0, 1, -1):
                return base ** (n if n < 2 else 2 + n % 2)
            # The length of the result is known beforehand: 9^(9^9) is never written out.
            if bits * n <= MAX_BITS:
                self.work.spend(2 + (bits * n) ** 2 // 2_000_000)
                return base ** n
        #   2^(2^60) and beyond: even the exponent of the result would not fit
        if n.bit_length() > 60:
            raise CannotDecide("an exponent too large")
        base, result = self.ball(base), Ball(_ONE, _ZERO, _ZERO)
        while n:  # square and multiply: sixty products at most
            if n & 1:
                result = self.mul(result, base)
            n >>= 1
            base = self.mul(base, base) if n else base
        return result

    def rational_power(self, base, exponent: Fraction):
        """base^(p/q): exact where it comes out; for odd q the real root of a negative base."""
        p, q = exponent.numerator, exponent.denominator
        if isinstance(base, Ball):
            base = self.real(base)
        # Three cases: a real base below zero, a real base above, and a complex one.
        real = not (isinstance(base, Ball) and base.im)
        negative = real and (base.re if isinstance(base, Ball) else base) < 0
        # For odd q the real root, as school has it: (-8)^(1/3) = -2, while the main branch would
        # give 1 + i sqrt(3). Even q has no real root and goes to the branch below.
        if negative and q % 2 and q < MAX_REAL_ROOT:
            root = self.rational_power(self.neg(base), exponent)
            return self.neg(root) if p % 2 else root
        # Exact roots first: sqrt(4/9) = 2/3 keeps the comparison in
        # fractions, with no digits to doubt.
        if not isinstance(base, Ball) and not negative and q <= 64:
            top, bottom = _exact_root(base.numerator, q), _exact_root(base.denominator, q)
            if top is not None and bottom is not None:
                return self.integer_power(Fraction(top, bottom), p)
        # Square roots are most of all roots, and Decimal's own is faster and
        # sharper than exp and log.
        if q == 2 and real:
            return self.integer_power(self.square_root(base), p)
        return self.exp(self.mul(exponent, self.log(base)))

    def square_root(self, value) -> Ball:
        """The root of a real number, imaginary if it is negative; error e / sqrt(x)."""
        value = self.ball(value)
        self.work.spend(4 + self.precision // 20)
        size = abs(value.re)
        # Too near zero to have a sign. A root magnifies its error: 1e-48 becomes 1e-24.
        if size <= 2 * value.err:
            # Too vague, and its root would be half as precise again: better
            # no value than a wide one.
            if value.err > Decimal("1e-40"):
                raise CannotDecide("not enough digits left")
            return Ball(_ZERO, _ZERO, (3 * value.err).sqrt())
        root = size.sqrt()
        error = value.err / root + self.ulp(root)
        return Ball(root, _ZERO, error) if value.re > 0 else Ball(_ZERO, root, error)

    def exp(self, value) -> Ball:
        """e^z; an error e in z becomes about |e^z| e."""
        value = self.ball(value)
        # 3 |e^z| err below holds for small errors only; a wide ball has no digits to offer anyway.
        if value.err > Decimal("1e-10"):
            raise CannotDecide("not enough digits left")
        self.tiny(value)
        size = _ONE
        if value.re:
            self.heavy()
            size = value.re.exp()
        #   e^(a + bi) = e^a (cos b + i sin b)
        if value.im:
            cosine, sine = self.cos_sin(value.im)
            re, im = size * cosine, size * sine
        else:
            re, im = size, _ZERO
        return Ball(re, im, 3 * size * value.err + self.ulp(2 * size))

    def log(self, value) -> Ball:
        """The main branch: the imaginary part is in (-pi, pi], and pi for negative numbers."""
        value = self.real(self.ball(value))
        self.heavy()
        # log(1 + d) is about d: the error is relative to the size, hence divided by it below.
        low = value.floor_size() - 2 * value.err
        if low <= 0:
            raise CannotDecide("a logarithm of zero")
        if value.im:
            re = (value.re * value.re + value.im * value.im).ln() / 2
            im = self.atan2(value.im, value.re)
        else:
            # ln |x|, and the angle: 0 to the right of zero, pi to the left. So log(-1) = i pi.
            re, im = abs(value.re).ln(), _ZERO if value.re > 0 else _pi(self.precision)
        return Ball(re, im, 2 * value.err / low + self.ulp(abs(re) + abs(im) + 1))

    def heavy(self) -> None:
        """The cost of a transcendental function grows with the square of the digits."""
        # At 50 digits about 33 units, at 1000 digits 3358: four such calls use up the budget.
        self.work.spend(25 + self.precision * self.precision // 300)

    def tiny(self, value: Ball) -> None:
        """exp and cos of a tiny number are 1 to many digits: remember how many it takes."""
        if not value.is_null() and value.floor_size().adjusted() < -5:
            # e^x = 1 + x + ..., cos x = 1 - x^2/2: the square has twice as many
            # zeros, hence the factor 2.
            self.need = max(self.need, 20 - 2 * value.floor_size().adjusted())

    # -- angles -------------------------------------------------------------------------------
    def cos_sin(self, angle: Decimal) -> tuple[Decimal, Decimal]:
        """cos and sin of a real number: take whole turns away, halve, Taylor, double."""
        #   angle 1e30: its last turn is only known with 30 digits more; 1e100 is past any meaning
        shift = max(angle.adjusted(), 0)
        if shift > 100:
            raise CannotDecide("an angle too large")
        if angle < 0:
            cosine, sine = self.cos_sin(-angle)
            return cosine, -sine
        if angle in self.angles:
            return self.angles[angle]
        self.work.spend(30 + self.precision * self.precision // 300)
        with decimal.localcontext(self.context) as context:
            # The digits before the point are lost in the reduction, and the ten
            # doublings lose some more.
            context.prec = self.precision + shift + 12
            turn = 2 * _pi(context.prec)
            # Divided by 2^10: at most 0.0031 is left, where each Taylor term brings five digits.
            rest = (angle - (angle / turn).to_integral_value() * turn) / 1024
            square, term, sine, cosine, k = rest * rest, rest, rest, _ONE, 1
            limit = Decimal(10) ** -context.prec
            even = -square / 2
            while abs(even) > limit:
                cosine += even
                term = -term * square / ((k + 1) * (k + 2))
                sine += term
                k += 2
                even = -even * square / (k * (k + 1))
            #   cos 2x = 2 cos^2 x - 1,   sin 2x = 2 sin x cos x, ten times
            for _ in range(10):
                cosine, sine = 2 * cosine * cosine - 1, 2 * sine * cosine
        # Unary plus rounds to the precision outside, that of the caller.
        self.angles[angle] = +cosine, +sine
        return self.angles[angle]

    def atan2(self, y: Decimal, x: Decimal) -> Decimal:
        """The angle of x + iy in (-pi, pi], by Newton's method."""
        size = (x * x + y * y).sqrt()
        # The only floats of the checker: a first guess of 15 digits. What sin(angle - guess) says
        # of the rest is right but for its cube, so the digits triple: 15, 45, 135, 405, 1215.
        guess, digits = Decimal(math.atan2(y / size, x / size)), 15
        while digits < self.precision:
            cosine, sine = self.cos_sin(guess)
            guess, digits = guess + (y * cosine - x * sine) / size, 3 * digits
        return guess

    # -- one method a kind of node ------------------------------------------------------------
    def do_num(self, value, places):
        """A literal is exact."""
        # `places` serves `rounds_to` alone: by value 0.50 is 1/2.
        return value

    def do_sym(self, name):
        """A letter has the value of the point."""
        # A bound letter outside its sum, or a letter of a region, where no point is given.
        if name not in self.point:
            raise CannotDecide(f"{name} has no value")
        return self.point[name]

    def do_const(self, name):
        """pi, e and i; arithmetic with infinity is refused."""
        if name == "pi":
            # Their sizes rounded up: pi < 4, e < 3.
            return Ball(+_pi(self.precision), _ZERO, self.ulp(Decimal(4)))
        if name == "e":
            return Ball(_ONE.exp(), _ZERO, self.ulp(Decimal(3)))
        if name == "i":
            return Ball(_ZERO, _ONE, _ZERO)
        # oo - oo and 0 * oo have no value; a lone oo was compared by name before it came here.
        raise CannotDecide("arithmetic with infinity")

    def do_add(self, terms):
        total = self.evaluate(terms[0])
        for term in terms[1:]:
            total = self.add(total, self.evaluate(term))
        return total

    def do_mul(self, factors):
        result = self.evaluate(factors[0])
        for factor in factors[1:]:
            result = self.mul(result, self.evaluate(factor))
        return result

    def do_neg(self, x):
        return self.neg(self.evaluate(x))

    def do_inv(self, x):
        return self.inverse(self.evaluate(x))

    def do_pow(self, base, exponent):
        """Powers of e go to exp at once; e^0 stays exact."""
        if base == ("const", "e"):
            exponent = self.evaluate(exponent)
            # Otherwise e^0 would be a ball around 1, which no factorial or floor could count with.
            return 1 if _is_exact_zero(exponent) else self.exp(exponent)
        return self.power(self.evaluate(base), self.evaluate(exponent))

    def do_root(self, degree, x):
        """The n-th root, n a whole number: a power of 1/n, real for odd n."""
        degree = self.evaluate(degree)
        # Degree 1 is no root, and sqrt[1/2]{x} is more likely a misprint than a square.
        if isinstance(degree, Ball) or degree.denominator != 1 or degree < 2:
            raise CannotDecide("a root whose degree is not a whole number")
        return self.power(self.evaluate(x), Fraction(1, int(degree)))

    def whole(self, node, what: str) -> int:
        """A whole number that something counts with."""
        value = self.evaluate(node)
        # Exact values only: the factorial of a number near 5 is not 5!.
        if isinstance(value, Ball) or value.denominator != 1:
            raise CannotDecide(f"{what} of a number that is not whole")
        return int(value)

    def do_fact(self, x, step: int = 1):
        """n! (step 1) or n!! (step 2), exact up to MAX_FACTORIAL."""
        n = self.whole(x, "a factorial")
        # Checked before it is computed: 10^9! would not end.
        if not 0 <= n <= MAX_FACTORIAL:
            raise CannotDecide(f"a factorial outside 0..{MAX_FACTORIAL}")
        self.work.spend(2 + n * n // 10000)
        return math.factorial(n) if step == 1 else math.prod(range(n, 0, -2))

    def do_fact2(self, x):
        return self.do_fact(x, 2)

    def do_binom(self, n, k):
        """n over k, exact: k whole, n any rational number, as in n(n-1)/2."""
        n, k = self.evaluate(n), self.whole(k, "a binomial")
        if isinstance(n, Ball):
            raise CannotDecide("a binomial of a number that is not rational")
        # For whole n both k and n - k give the same; the smaller costs less.
        k = min(k, n - k) if n.denominator == 1 and 0 <= k <= n else k
        # The length of n over k is at most k log2 n bits.
        bits = n.numerator.bit_length() + n.denominator.bit_length()
        if k < 0 or k * bits > MAX_BITS:
            raise CannotDecide("a binomial outside its limits")
        self.work.spend(2 + 3 * k + k * k * bits // 10000)
        #   n (n-1) ... (n-k+1) / k!
        if n.denominator == 1 and n >= 0:
            return math.comb(int(n), int(k))
        return math.prod((n - i for i in range(int(k))), start=Fraction(1)) / math.factorial(int(k))

    def do_abs(self, x):
        """|z|; its error is that of z."""
        value = self.evaluate(x)
        if not isinstance(value, Ball):
            return abs(value)
        if not value.im:
            # Real: no root, no rounding. The sign of a number that could be
            # zero does not matter here.
            return Ball(abs(value.re), _ZERO, value.err)
        norm = (value.re * value.re + value.im * value.im).sqrt()
        return Ball(norm, _ZERO, value.err + self.ulp(norm))

    def do_floor(self, x, up: bool = False):
        """The floor, or the ceiling with up."""
        value = self.evaluate(x)
        if not isinstance(value, Ball):
            return math.ceil(value) if up else math.floor(value)
        value = self.real(value)
        # Near a step the digits decide, and within its error of a whole number they do not:
        # 1 - 10^{-60} pi is on either side. What is exactly whole came out exact (roots, logs).
        nearest = value.re.to_integral_value() if value.size() < Decimal("1e18") else None
        if value.im or nearest is None or abs(value.re - nearest) <= value.err:
            self.need = max(self.need, 2 * self.precision)  # more digits may tell
            raise CannotDecide("a floor of a number that is not real or not known well enough")
        return math.ceil(value.re) if up else math.floor(value.re)

    def do_ceil(self, x):
        return self.do_floor(x, True)

    def do_log(self, base, x):
        """ln x / ln base; exact where it comes out, so that a floor of log_2 8 is sure."""
        inside = self.evaluate(x)
        numerator = self.log(inside)
        # ln needs no division by ln e, and so keeps one error less.
        if base == ("const", "e"):
            return numerator
        base = self.evaluate(base)
        result = self.mul(numerator, self.inverse(self.log(base)))
        if not isinstance(base, Ball) and not isinstance(inside, Ball) and not result.im:
            #   log_4 8 = 3/2, because 8^2 = 4^3
            guess = Fraction(result.re).limit_denominator(12)
            if abs(guess) <= 300 and self.integer_power(inside, guess.denominator) == (
                    self.integer_power(base, guess.numerator)):
                return guess
        return result

    def do_pct(self, x):
        """In arithmetic, 5% is 5/100."""
        # A lone percent sign is peeled off before; here is 20% * 50 = 10.
        return self.mul(self.evaluate(x), Fraction(1, 100))

    def do_unit(self, x, name):
        """A unit inside a sum is a factor that nobody knows: (5 cm) + 3 is not 8."""
        #   (2 cm) + (3 cm) is (5 cm) all the same, and (6 cm)/(2 cm) is 3
        return self.mul(self.evaluate(x), self.do_call(name, ()))

    def do_deg(self, x):
        """pi/180 in a trigonometric function, and elsewhere a unit: 90° + 1 is not 91."""
        if not self.in_trig:
            return self.do_unit(x, "degree")
        return self.mul(self.mul(self.evaluate(x), self.do_const("pi")), Fraction(1, 180))

    def do_call(self, name, args):
        """An unknown function: a pseudo-random number that depends on its arguments only."""
        # f(x+1) and f(1+x) become the same number, f(x) and f(x+1) different ones, so f behaves as
        # a function nobody knows anything about: no identity about f holds that was not written.
        keys = []
        for arg in args:
            value = self.evaluate(arg)
            if isinstance(value, Ball):
                # Two roundings of the same argument must give one text, hence fewer figures than
                # known; and more than the gap that `add` lets pass without asking for precision.
                figures = self.precision - 18
                last = value.size().adjusted() - figures
                if value.is_null() or value.err.adjusted() > last - 5:
                    raise CannotDecide("an argument of a function that is not known well enough")
                keys.append(";".join(f"{part.quantize(Decimal(1).scaleb(last)):e}"
                                     for part in (value.re, value.im)))
            else:
                value = Fraction(value)
                # Two long arguments must not share a key: f(10^1000) is not f(10^1001).
                if max(value.numerator.bit_length(), value.denominator.bit_length()) > 3000:
                    raise CannotDecide("an argument of a function too long to compare")
                keys.append(str(value))
        # The name is part of the text: f and g are different functions.
        bits = _hash(f"{name}({';'.join(keys)})", 1)
        return Fraction(1000 + bits % 8999, 1000 + (bits >> 13) % 8999)

    def do_sum(self, name, low, high, body, multiply: bool = False):
        """Term by term, as long as the work lasts."""
        low, high = self.whole(low, "a sum"), self.whole(high, "a sum")
        # Checked before the loop, whose length an answer could otherwise set to 10^9.
        if high - low >= MAX_SUM_TERMS:
            raise CannotDecide(f"a sum of more than {MAX_SUM_TERMS} terms")
        # Also the result of an empty sum or product: high < low gives 0 or 1.
        outer, total = self.point, 1 if multiply else 0
        for k in range(low, high + 1):
            self.work.spend(1)
            # A new dict, so that a sum in a sum finds the outer letter as it was.
            self.point = {**outer, name: k}
            term = self.evaluate(body)
            total = self.mul(total, term) if multiply else self.add(total, term)
        self.point = outer
        return total

    def do_prod(self, name, low, high, body):
        return self.do_sum(name, low, high, body, multiply=True)

    def do_fn(self, name, args):
        """gcd, lcm, max, min of many; the others by a formula."""
        if name in ("gcd", "lcm", "max", "min"):
            return self.several(name, [self.evaluate(arg) for arg in args])
        # Saved and restored, for a sine can stand in a sine: the inner one ends, the outer goes on.
        outer = self.point, self.in_trig
        self.in_trig = name in CIRCULAR
        self.point, self.in_trig = {"x": self.evaluate(args[0])}, False
        value = self.evaluate(_formula(name))
        self.point, self.in_trig = outer
        return value

    def several(self, name: str, values: list):
        """gcd, lcm, max, min of rational numbers."""
        # The larger of two balls that overlap is not known.
        if any(isinstance(value, Ball) for value in values):
            raise CannotDecide(f"{name} of numbers that are not rational")
        if name in ("max", "min"):
            return max(values) if name == "max" else min(values)
        if any(value.denominator != 1 for value in values):
            raise CannotDecide(f"{name} of numbers that are not whole")
        return (math.gcd if name == "gcd" else math.lcm)(*map(int, values))


CIRCULAR = {"sin", "cos", "tan", "cot", "sec", "csc", "cis"}
# By complex exponentials and logarithms, which hold for real and complex x, and beyond 1, where
# arcsin is complex; the results of real arguments come out real within error.
_FORMULAS = {
    "sin": r"\frac{e^{ix} - e^{-ix}}{2i}", "cos": r"\frac{e^{ix} + e^{-ix}}{2}", "cis": "e^{ix}",
    "tan": r"\frac{\sin x}{\cos x}", "cot": r"\frac{\cos x}{\sin x}", "sec": r"\frac{1}{\cos x}",
    "csc": r"\frac{1}{\sin x}", "sinh": r"\frac{e^x - e^{-x}}{2}",
    "cosh": r"\frac{e^x + e^{-x}}{2}", "tanh": r"\frac{e^x - e^{-x}}{e^x + e^{-x}}",
    "coth": r"\frac{e^x + e^{-x}}{e^x - e^{-x}}", "arcsin": r"-i \ln(ix + \sqrt{1 - x^2})",
    "arccos": r"\frac{\pi}{2} - \arcsin x", "arctan": r"\frac{i}{2}(\ln(1 - ix) - \ln(1 + ix))",
    "arcsec": r"\arccos \frac{1}{x}", "arccsc": r"\arcsin \frac{1}{x}",
    "arccot": r"\arctan \frac{1}{x}"}


@lru_cache(maxsize=None)
def _formula(name: str) -> tuple:
    """The tree of a function's formula in x, read once."""
    return parse(_FORMULAS[name])


def _is_exact_zero(value) -> bool:
    """Zero without any doubt."""
    return not isinstance(value, Ball) and value == 0


def _exact_root(n: int, q: int) -> int | None:
    """The whole q-th root of n >= 0, or None if there is none."""
    # 0 and 1 are roots of themselves for any q.
    if n < 2:
        return n
    if q == 2:
        root = math.isqrt(n)
    elif n.bit_length() > 3000:
        # Long numbers have a root of whole digits only if written on
        # purpose; a ball does for those.
        return None
    else:
        # Bisection in whole numbers: float powers would miss the root of anything above 2^53.
        low, high = 1, 1 << (n.bit_length() // q + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle ** q <= n else (low, middle - 1)
        root = low
    return root if root ** q == n else None
