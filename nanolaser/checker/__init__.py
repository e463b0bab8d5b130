r"""The rule-based verifier: the answer out of a solution's text, and whether two answers are equal.

It decides the reward r_v, so a wrong True teaches a model to cheat and a wrong False hides what it
learned. It is exact where it can be (fractions), rigorous where it cannot (every inexact number
carries its error bound), bounded always (no input takes long), and says why: see `explain`.

How two answers are compared, first rule that applies:
  1. the same text, or the same tree (parse.py holds the grammar): equal;
  2. no tree on one side: equal only as normalised text;
  3. structure against structure: list, set, tuple or interval, union, matrix, relation, ratio,
     number base, words, each by the rule of its own function below;
  4. expressions: both sides are evaluated, once if they have no letters, otherwise at fixed
     pseudo-random points (integers for letters that count something). Rational arithmetic is
     exact; roots, pi, e, i, logarithms and trigonometry are complex balls of 50 digits or more.
     One point where they differ proves them unequal; equal means equal at every point where both
     are defined, with more digits than the numbers written in the answers could hide behind.
Beyond a limit the answer is "cannot decide", which counts as unequal.

Policy where graders disagree (as Math-Verify 0.9.0 decides, except where that is wrong as
mathematics; the trusted side is `gold`):
  50% against 50, and against 0.5         equal, equal
  1/3 against 0.33, 0.333333              no; yes (six decimals agree and four figures)
  two decimals, 0.333333 and 0.3333333    no: two written decimals are compared exactly
  3, 5 against 5, 3; against 3, 5, 5      equal (a bare list has no order); no
  \{1,2,2\} against \{1,2\}; (1,2), (2,1)     equal; no (a tuple has an order)
  \{5\} against 5                         equal (the solution set of one solution)
  (1,3) or 1, 3 for gold \{1,3\}            equal; (3,1) for \{1,3\}: no; \{1,3\} for gold (1,3): no
  (2,3) against x=2, y=3                  equal
  5 against x=5; y=5 against x=5          equal; no
  x = 5+6 = 11 for gold 11                equal (the last member); 11 for gold 5+6=11: no
  2x+4y=6 against x+2y=3; 0=x-4, x=4      equal (equations up to a factor)
  2x=8 for gold x=4                       no (restating the question is no answer)
  2x>6 against x>3; -x<-3 against x>3     no (not solved); equal
  [-2,7] for gold -2<=x<=7; the reverse   equal; no (restating the question is no answer)
  15 cm against 15; against 15 m          equal; no (two units must agree, none is converted)
  90 degrees against 90; against pi/2     equal; no
  42 against 52_8, 52_8 against 52        no (the base is the question)
  2/4 against 1/2; 1+1 against 2          equal; equal (unevaluated is accepted)
  \log without a base                     base 10
  \sqrt{x^2} against x; \sqrt[3]{-8}, -2    no (letters are real, of either sign); equal
  Yes against YES; b against B            equal (words and choice letters); 2a against 2A: no
  3:4 against 3/4; against 6:8            equal; equal (but clock times compare as written)
  5 because x is positive, for gold 5     no (prose is not an answer)
  several boxes in a text                 the last counts; with strict there must be exactly one
"""

# Standard library only, and no float anywhere in a verdict: a float has 16 digits, so 1 + 10^-17
# would "equal" 1. Fraction is exact, and Decimal has as many digits as are asked for.
import decimal
import math
import re
from binascii import crc32
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from .parse import MAX_CHARS, ParseError, clean, is_structure, parse, unbox

# Every bound below is a wall against slow inputs (a model under RL finds them by accident), and far
# above what a benchmark answer needs. To meet one is an unequal verdict, never an exception: one
# rollout's reward must not be able to stop a training run. All of MAX_WORK is spent in about a
# hundredth of a second, so a step with a thousand hostile answers loses seconds, not hours.
MAX_WORK = 15000         # unit: about one microsecond of work on a laptop core
MAX_BITS = 32000         # of an exact numerator or denominator (about 9600 digits)
# 3000! has 30332 bits, just below MAX_BITS: nothing longer could be computed with any further.
MAX_FACTORIAL = 3000     # of the argument of an exact factorial
MAX_SUM_TERMS = 2000
# `_agree` wants 25 digits in common; fifty leave as many for rounding errors and cancellation. The
# cap of 1000 lets an answer hold 10^-900, and stops one that holds 10^-100000.
FIRST_PRECISION = 50     # digits
MAX_PRECISION = 1000
MAX_REAL_ROOT = 100      # (-8)^(1/3) is -2; denominators at random points rarely are so low


class CannotDecide(ValueError):
    """A limit was met, or a point where an expression has no value; the message names it."""


# ---------------------------------------------------------------------------------------------
# The answer out of a text

# The same scan sees boxes and braces, so that \boxed{\frac{1}{2}} ends at the brace that closes it.
# `\\.` consumes an escaped brace: in \boxed{\{1,2\}} it neither opens nor closes a group. The
# lookahead keeps a command that only begins alike, such as \boxedfoo, from counting as a box.
_BOX_OR_BRACE = re.compile(r"""(?P<box>\\(?:boxed|fbox)(?![A-Za-z])\s{0,8})(?P<open>\{)?
                               |\\.|[{}]""", re.X | re.S)
# What \boxed 5 or \boxed -3 holds: up to the next space or brace; a bounded run, hence linear.
_BARE = re.compile(r"-?[^\s{}$\\]{1,100}")
BOX_WINDOW = 2 * MAX_CHARS  # a longer box holds no answer; the window keeps the search short
# A text of a thousand unclosed boxes must cost no more than this many windows.
MAX_BOX_TRIES = 8


def extract_answer(text: str, strict: bool = False) -> str | None:
    r"""Return what the last \boxed{...} of a text holds, or None where there is no box.

    Braces are matched; \fbox{5}, \boxed 5 and nested boxes are understood; a box that never closes
    is passed over. With strict, the rule of the paper's training reward: exactly one "\boxed" in
    the text, with braces, otherwise None.
    """
    # Two boxes are how a policy hedges ("\boxed{4} or \boxed{5}"): with strict that earns nothing.
    if strict and text.count("\\boxed") != 1:
        return None
    # From the end backwards, because the last box is the answer and a solution can be
    # long. Each try looks at a bounded window only; the whole text is never scanned
    # with the regular expression.
    end = len(text)
    for _ in range(MAX_BOX_TRIES):
        last = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if last < 0:
            return None
        end = max(0, last - BOX_WINDOW)
        # Usually the boxes before have closed by now; otherwise this one may lie inside another.
        first = min((k for k in (text.find("\\boxed", end, last), text.find("\\fbox", end, last))
                     if k >= 0), default=last)
        # As many braces open as closed between that box and this one: it is
        # over, this one stands alone.
        alone = text.count("{", first, last) == text.count("}", first, last)
        # The next try, if this box never closes, goes on before it.
        end = last if alone else end
        content = _last_box(text[end:last + BOX_WINDOW], strict, alone)
        if content is not None:
            return content
    return None


def _last_box(window: str, strict: bool, first_only: bool) -> str | None:
    """The content of the last box that closes within the window; of nested boxes the outermost.

    With first_only, the window begins with the box that is wanted.
    """
    open_braces, closed = [], []  # starts of open braces (None unless a box's); (start, content)
    for match in _BOX_OR_BRACE.finditer(window):
        token = match.group()
        if match.group("box"):
            if match.group("open"):
                # With strict, \fbox is an ordinary command: its braces are
                # matched but hold no answer.
                counts = not strict or token.startswith("\\boxed")
                open_braces.append(match.end() if counts else None)
            elif not strict and (bare := _BARE.match(window, match.end())):
                # Keyed by where the content starts, so that an enclosing box
                # can tell it was inside.
                closed.append((match.end(), bare.group().rstrip(".,;")))
        elif token == "{":
            open_braces.append(None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                # \boxed{a = \boxed{5}}: the inner box closed first, and the
                # outer one takes its place.
                while closed and closed[-1][0] > start:  # boxes inside this one
                    closed.pop()
                closed.append((start, window[start:match.start()].strip()))
                if first_only and not open_braces:
                    break
    if not closed:
        return None
    content = closed[-1][1]
    # The marks of inner boxes go here: \boxed{\boxed{3}} yields 3.
    return unbox(content) if "\\boxed" in content or "\\fbox" in content else content


# ---------------------------------------------------------------------------------------------
# The public questions

class Explanation(NamedTuple):
    """Why two answers are equal or not: the verdict, the rule that decided, both parsed forms."""
    equal: bool
    rule: str
    answer_form: str
    gold_form: str

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "not equal"
        return f"{verdict}: {self.rule}\n  answer: {self.answer_form}\n  gold:   {self.gold_form}"


def is_equivalent(answer: str, gold: str) -> bool:
    """Is `answer` the same answer as `gold`, the trusted side? Never raises; doubt is False."""
    return _decide(answer, gold)[0]


def is_correct(response: str, gold: str, strict: bool = False) -> bool:
    r"""The reward r_v in {0, 1} as a bool: does the last \boxed{...} of a response equal gold?"""
    # No box, no reward: a right number somewhere in the prose is not an answer, and to search for
    # it would pay a policy for listing many numbers.
    answer = extract_answer(response, strict)
    return answer is not None and is_equivalent(answer, gold)


def explain(answer: str, gold: str) -> Explanation:
    """The verdict of `is_equivalent` with the rule that decided and how each side was read."""
    equal, rule = _decide(answer, gold)
    return Explanation(equal, rule, _form(answer), _form(gold))


def parses(gold: str) -> bool:
    """Does a gold answer parse to a structure? If not, only equal text can ever be right."""
    try:
        # The gold goes through the same text conversion as in `_decide`, so
        # both agree on JSON numbers.
        parse(_text(gold))
    except ParseError:
        return False
    return True


def _text(value) -> str:
    """Benchmark files store some golds as JSON numbers."""
    return value if isinstance(value, str) else "" if value is None else str(value)


# An integer, an e, a sign and one digit: 2e-3, 10e+2. Not 1.5e-3 (the lookbehind), which is always
# scientific notation, and not 2e-12, since nobody writes "2e minus 12" without meaning a power.
_EULER_OR_TEN = re.compile(r"(?<![\d.])(\d{1,6})e(?=[+-]\d(?!\d))")


def _decide(answer, gold) -> tuple[bool, str]:
    """The verdict and the rule behind it."""
    answer, gold = _text(answer).strip(), _text(gold).strip()
    # Empty against empty is no agreement: an empty box for a missing gold must earn nothing.
    if not answer or not gold:
        return False, "an empty answer"
    # Before any parsing, so that prose, proofs and unknown notation copied from the gold are right.
    if answer == gold:
        return True, "the same text"
    if len(answer) > MAX_CHARS or len(gold) > MAX_CHARS:
        return False, f"cannot decide: different texts, one longer than {MAX_CHARS} characters"
    equal, rule = _decide_by_trees(answer, gold)
    # Cheap test first: nearly all pairs have no such number, and are parsed once only.
    if not equal and "e" in answer + gold:
        # 2e-3 is 0.002 or twice Euler's number minus 3: the second reading is tried on both sides.
        spaced = [_EULER_OR_TEN.sub(r"\1 e ", side) for side in (answer, gold)]
        if spaced != [answer, gold]:
            # Both at once: what means Euler's number on one side means it on the other side too.
            return _decide_by_trees(*spaced)
    return equal, rule


def _decide_by_trees(answer: str, gold: str) -> tuple[bool, str]:
    """Parse both sides and compare the trees; where one does not parse, the texts."""
    # The gold first: when both fail, the message is about the trusted side, where a data set's
    # notation needs a new grammar rule.
    try:
        gold_tree = parse(gold)
        answer_tree = parse(answer)
    except ParseError as error:
        # Two texts that normalise to nothing (only spaces and $) are not equal either.
        same = bool(_normalised(gold)) and _normalised(answer) == _normalised(gold)
        return same, f"compared as text, because one side does not parse: {error}"
    # Safe for any kind of tree, because the trees are plain tuples of strings and exact numbers.
    # Never by value: 0/0 against 0/0 has the same tree, and no value at all.
    if answer_tree == gold_tree:
        return True, "the same structure"
    answer_tree, gold_tree = _without_domain(answer_tree, gold_tree)
    try:
        return _Comparison().same(answer_tree, gold_tree)
    except CannotDecide as error:
        return False, f"cannot decide: {error}"


_TEXT_FACE = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s?\{([^{}]*)\}")
_NOISE = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|[\s$]")


def _normalised(text: str) -> str:
    """A text without spaces and faces, for golds that are prose; braces stay, they can matter."""
    # Digits that a space separates must not merge when spaces vanish: "1 000" and "1 0 0 0" would
    # be one text, and so would the lists "1 23" and "12 3".
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", clean(text))  # 1 000 is not 1000
    return _NOISE.sub("", _TEXT_FACE.sub(r"\1", text)).replace("\\dfrac", "\\frac")


def _form(text: str) -> str:
    """How a text was read, in one short line."""
    try:
        shown = show(parse(_text(text)))
    except ParseError as error:
        shown = f"not parsed ({error}): {_text(text)!r}"
    return shown if len(shown) <= 200 else shown[:197] + "..."


def show(node) -> str:
    """A tree as a short prefix expression, for `explain`."""
    if not isinstance(node, tuple):
        return str(node)
    if node and node[0] == "num":
        # A decimal is shown as one: 0.5, not the 1/2 that the tree holds.
        text = str(node[1]) if node[2] is None else str(float(node[1]))
        return text if len(text) < 40 else text[:37] + "..."
    if node and node[0] in ("sym", "const", "text", "domain") and len(node) == 2:
        return node[1]
    head, rest = (node[0], node[1:]) if node and isinstance(node[0], str) else ("", node)
    return f"{head}({', '.join(show(part) for part in rest)})"


# ---------------------------------------------------------------------------------------------
# Structures

class _Comparison:
    """One comparison of two trees; holds the work that is left to it, and nothing else."""

    # A fresh budget for each comparison: what a pair costs cannot depend on the pairs before it.
    def __init__(self):
        self.work = _Work()

    def same(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Equal or not, and the rule that decided; raises CannotDecide."""
        self.work.spend(2)
        if answer == gold:
            return True, "the same structure"
        # A node's first entry is its kind. The order of the tests below is the order
        # of binding, loosest first: a list may hold relations, a relation may hold
        # sets, a set may hold numbers.
        #   kinds ("rel", "num")     x=5  against 5       -> relations
        #   kinds ("list", "set")    1, 2 against \{1,2\} -> lists
        kinds = (answer[0], gold[0])
        if "list" in kinds or "or" in kinds:
            return self.lists(answer, gold)
        if "rel" in kinds:
            return self.relations(answer, gold)
        if "text" in kinds:
            return False, "words against something else"  # equal words are equal trees
        if "setop" in kinds or "domain" in kinds:
            return self.unions(answer, gold)
        if "set" in kinds:
            return self.sets(answer, gold)
        if "tuple" in kinds:
            return self.tuples(answer, gold)
        if "matrix" in kinds:
            return self.matrices(answer, gold)
        if "base" in kinds:
            # Equal bases and digits are equal trees, met above. 42 for 52_8 would let a model skip
            # the conversion that the question asks for, in either direction.
            return False, "a number in a base is compared with its digits"
        if "ratio" in kinds:
            return self.ratios(answer, gold)
        return self.scalars(answer, gold)

    def equal(self, answer: tuple, gold: tuple) -> bool:
        """The verdict alone."""
        return self.same(answer, gold)[0]

    def matched(self, answers: tuple, golds: tuple) -> bool:
        """Can the two lists be paired off? Greedy is right, because equality is transitive."""
        # Against hedging: 3, 5, 7 for gold 3, 5 lists the right values and one more, and is wrong.
        if len(answers) != len(golds):
            return False
        left = list(answers)
        for gold in golds:
            # Usually the order is the same, so the first one left over is the partner.
            found = next((k for k, answer in enumerate(left) if self.equal(answer, gold)), None)
            if found is None:
                return False
            # Each answer is used once: 5, 5 must not pass for 5, 3 by pairing the same 5 twice.
            del left[found]
        return True

    def covered(self, answers: tuple, golds: tuple) -> bool:
        """As sets: every element of either side has an equal one on the other side."""
        # Both directions. One alone would accept \{1\} for \{1,2\}, or a superset that hedges.
        return (all(any(self.equal(a, g) for a in answers) for g in golds)
                and all(any(self.equal(a, g) for g in golds) for a in answers))

    def in_order(self, answers: tuple, golds: tuple) -> bool:
        """As sequences: the same length, and equal at every place."""
        return len(answers) == len(golds) and all(map(self.equal, answers, golds))

    def lists(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """A bare list against a list, a set or a tuple."""
        #   list  3, 5 -> (3, 5)      set  \{3,5\} -> (3, 5)      tuple  (3,5) -> (3, 5)
        answers, golds = _items(answer), _items(gold)
        if "set" in (answer[0], gold[0]):
            return self.covered(answers, golds), "the same set of elements"
        # Only gold may be the inequalities. For gold (-oo,1) U (3,oo) the answer x<1 or x>3 can be
        # the question itself, copied; see the policy table.
        if "or" in (answer[0], gold[0]) and gold[0] in ("or", "list") and answer[0] in (
                "tuple", "setop") and all(item[0] == "rel" for item in golds):
            return _same_region(_region(answer, self.work), _solved(gold, self.work)), (
                "an interval that solves the inequalities")
        # Names on one side are enough; names on both sides are two lists,
        # compared as relations below.
        names = _assigned_names(gold) or _assigned_names(answer)
        if names and "tuple" in (answer[0], gold[0]):
            # x=2, y=3 is the point (2, 3), its coordinates in the order of the letters.
            return (self.in_order(_by_name(answer), _by_name(gold)),
                    "coordinates against assignments in the order of their letters")
        if "tuple" in (answer[0], gold[0]):
            point = gold if gold[0] == "tuple" else answer
            #   (1, 3] against 1, 3: half open, so an interval, which is no list of its ends
            if point[1:3] != ("(", ")"):
                return False, "an interval against a list"
            # Whoever writes the brackets of a point has fixed the order. The trusted side
            # decides whether order counts: a gold list takes a tuple in any order, a gold
            # tuple a list in its own order.
            if gold[0] == "tuple":
                return self.in_order(answers, golds), "the elements of a tuple in order"
            return self.matched(answers, golds), "the same elements in any order"
        if answer[0] not in ("list", "or") or gold[0] not in ("list", "or"):
            return False, "one answer against several"
        #   gold x=2, y=3: the answer 2, 3 is right; 3, 2 would swap the unknowns
        if _assigned_names(gold) and not any(item[0] == "rel" for item in answers):
            return self.in_order(answers, golds), "values in the order of the named golds"
        return self.matched(answers, golds), "the same elements in any order"

    def sets(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Sets against sets; with a tuple or a single value the policy table decides."""
        if answer[0] == gold[0] == "set":
            return self.covered(answer[1], gold[1]), "the same set of elements"
        # (1,3) for \{1,3\} is careless notation, (3,1) is rather a point: only the
        # gold's order passes. The reverse, \{1,3\} for a point, is refused below,
        # since a set has lost the order.
        if answer[0] == "tuple" and (answer[1], answer[2]) == ("(", ")") and gold[0] == "set":
            return self.in_order(answer[3], gold[1]), "a tuple for a set, in the gold's order"
        solution, other = (answer, gold) if answer[0] == "set" else (gold, answer)
        # The order of the two arguments is kept in the call, since `same`
        # trusts its second argument.
        if len(solution[1]) == 1 and not is_structure(other):
            return self.equal(*((solution[1][0], other) if solution is answer
                                else (other, solution[1][0]))), "a set of one element"
        return False, "a set against something else"

    def tuples(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Tuples, points and intervals: the same brackets, the same elements in order."""
        if answer[0] != gold[0]:
            return False, "a tuple or interval against something else"
        if len(answer[3]) != len(gold[3]):
            return False, "tuples of different lengths"
        plain = all(side[1:3] in (("(", ")"), ("[", "]")) for side in (answer, gold))
        # With three elements or more no interval is meant, and [1,2,3] is (1,2,3).
        if answer[1:3] != gold[1:3] and not (plain and len(gold[3]) > 2):
            return False, "different brackets"
        return self.in_order(answer[3], gold[3]), "elements in order"

    def matrices(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """The same shape and equal entries; a row is not a column."""
        #   bmatrix and pmatrix give the same tree: brackets of a matrix carry no meaning
        if answer[0] != gold[0]:
            return False, "a matrix against something else"
        if len(answer[1]) != len(gold[1]) or len(answer[1][0]) != len(gold[1][0]):
            return False, "matrices of different shapes"
        # The parser has checked that rows have one length, so a first row speaks for all.
        return all(map(self.in_order, answer[1], gold[1])), "matrix entries"

    def ratios(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """3:4 is 6:8 and 3/4, unless a clock could show it."""
        # A question about a time wants the time: 1:15 is not 2:30, nor is the number 2.5.
        if any(side[0] == "ratio" and _is_clock(side) for side in (answer, gold)):
            if answer[0] != gold[0]:
                return False, "a time or ratio against something else"
            return self.in_order(answer[1], gold[1]), "times or ratios as written"
        # A plain value is a ratio to one: 3:4 against 3/4 becomes (3, 4) against (3/4, 1).
        parts = [side[1] if side[0] == "ratio" else (side, ("num", 1, None))
                 for side in (answer, gold)]
        if any(is_structure(side) and side[0] != "ratio" for side in (answer, gold)) or (
                len(parts[0]) != len(parts[1])):
            return False, "ratios of different kinds"
        # Cross-multiplied, because a quotient could divide by zero. With a:b:c against p:q:r:
        #   a p = p a,  b p = q a,  c p = r a
        one, other = parts
        cross = [(("mul", (a, other[0])), ("mul", (b, one[0]))) for a, b in zip(one, other)]
        zero = ("num", 0, None)
        return (all(self.equal(a, b) for a, b in cross)
                # Zero parts make every product zero: a ratio of zeros would be
                # proportional to anything.
                and not any(self.equal(x, zero) for x in one + other)), "proportional ratios"

    def unions(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Unions, intersections and differences, worked out as sets of reals."""
        try:
            return (_same_region(_region(answer, self.work), _region(gold, self.work)),
                    "the same set of real numbers")
        except CannotDecide as error:
            # Not a failure yet: the ends may be letters, as in (-oo, a) U (b, oo).
            if answer[0] != "setop" or gold[0] != "setop" or answer[1] != gold[1]:
                return False, f"cannot decide: {error}"
        # Ends with letters in them: compare part by part; only a difference has an order.
        # (0,a) U (b,1) equals (b,1) U (0,a) but is not evaluated: that needs to know whether a < b.
        if answer[1] == "setminus":
            return self.in_order(answer[2:], gold[2:]), "the same parts of a difference"
        return (self.matched(_parts(answer, answer[1]), _parts(gold, gold[1])),
                "the same parts in any order")

    # -- equations and inequalities -----------------------------------------------------------
    def relations(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Equations, assignments, inequalities, and a value against any of them."""
        if answer[0] == gold[0] == "rel":
            return self.two_relations(answer, gold)
        relation, other = (answer, gold) if answer[0] == "rel" else (gold, answer)
        # x<5 is no 5; only the interval that solves a gold inequality may stand against it.
        if any(op not in ("=", "in", "~") for op in relation[1]):
            # The order of the roles matters: -2<=x<=7 as an answer can be a copy of the question.
            if relation is gold and other[0] in ("tuple", "setop", "set", "domain"):
                return _same_region(_region(other, self.work), _solved(gold, self.work)), (
                    "an interval that solves the inequality")
            return False, "an inequality against something else"
        # gold x = 5+6 = 11 shows its working; 11 alone would not show which member was asked for.
        if relation is gold and len(gold[1]) > 1:
            return False, "a chain as gold wants a chain"
        if not _is_name(relation[2][0]):
            turned = _assignment(relation)  # 5 = x
            if not turned:
                return False, "an equation against something else"
            relation = ("rel", ("=",), turned)
        # A chain must be true: x = 5+7 = 11 is not 11, otherwise any wrong derivation
        # that ends in a guess at the gold would pass. Members with letters are left
        # out, they can be definitions.
        constants = [side for side in relation[2] if not is_structure(side) and not _letters(side)]
        if not all(self.equal(side, constants[0]) for side in constants[1:]):
            return False, "a chain of unequal members"
        # The last member is the result: x = 5+6 = 11 answers 11.
        equal, rule = self.same(*((relation[2][-1], other) if answer[0] == "rel"
                                  else (other, relation[2][-1])))
        return equal, f"right-hand side; {rule}"

    def two_relations(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """A relation against a relation; chains are compared link by link, in any order."""
        one, other = _assignment(answer), _assignment(gold)
        if answer[1] == ("in",) and gold[1] != ("in",) and one[0] in gold[2]:
            return self.same(one[1], gold)  # x in [2, oo) is as good as [2, oo)
        # f(x) = (x+1)^2 against f(x) = x^2+2x+1: the right sides decide, with
        # the rules for expressions.
        if one and other and one[0] == other[0]:
            equal, rule = self.same(one[1], other[1])
            return equal, f"the same name; {rule}"
        # Past this point sides are subtracted, which is only possible with numbers.
        if any(is_structure(side) for side in answer[2] + gold[2]):
            return False, "relations between structures that differ"
        answers, golds = _links(answer), _links(gold)
        if other and not _letters(other[1]) and len(answers) == 1 and answers[0][0] == "=":
            # The gold is solved: 2x = 10 only restates the question, x - 5 = 0 is let pass.
            # The difference has no factor but the sign here: 0 = x-4 passes for x = 4,
            # 2x-8 = 0 does not. Factors would let any equation with the right root pass,
            # the question's own among them.
            opposite = ("neg", answers[0][1])
            return (self.equal(answers[0][1], golds[0][1]) or self.equal(opposite, golds[0][1]),
                    "an equation that is solved, up to its sign")
        if len(answers) != len(golds):
            return False, "chains of different lengths"
        # 1 < x <= 4 and 4 >= x > 1 have the same two links, met in another order.
        left = list(answers)
        for op, difference in golds:
            found = next((k for k, link in enumerate(left)
                          if link[0] == op and self.link(op, link[1], difference)), None)
            if found is None:
                return False, "equations up to a factor, inequalities as they stand"
            del left[found]
        return True, "equations up to a factor, inequalities as they stand"

    def link(self, op: str, answer: tuple, gold: tuple) -> bool:
        """left - right of both sides: the same for < and <=, proportional for = and !=."""
        # A factor of an inequality is refused (2x>6 for x>3), since division by it is the question.
        if op in ("<", "<="):
            return self.equal(answer, gold)
        points = _points(_letters(answer) | _letters(gold), answer, gold)
        pairs, compared = [], 0
        for point in points:
            # A point where one side has no value is skipped, such as x = 0 of 1/x.
            try:
                pairs.append([_Evaluator(point, FIRST_PRECISION + 30, self.work).value(side)
                              for side in (answer, gold)])
            except CannotDecide:
                continue
        # Proportional means: l(p) r(b) = r(p) l(b) at every point p, with one fixed base
        # point b where both are nonzero. Without such a point an identity (x = x) would
        # be proportional to everything.
        base = next((p for p in pairs if not _is_zero(p[0]) and not _is_zero(p[1])), None)
        if base is None or not _letters(answer) or not _letters(gold):
            return False
        # Thirty digits more than usual, for the two products lose some; the
        # values come with bounds.
        evaluator = _Evaluator({}, FIRST_PRECISION + 30, self.work)
        for pair in pairs:
            with decimal.localcontext(evaluator.context):
                left = evaluator.mul(pair[0], base[1])
                right = evaluator.mul(pair[1], base[0])
                if not _agree(left, right):
                    return False
            compared += 1
        # Three, as in `at_points`; one point alone is the base itself and proves nothing.
        return compared >= 3

    # -- numbers and expressions --------------------------------------------------------------
    def scalars(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Percentages, units and choice letters aside, two expressions are equal as functions."""
        if is_structure(answer) or is_structure(gold):
            return False, "different kinds of answer"
        # Before evaluation, as letters: choice B and b are two different variables otherwise.
        if answer[0] == gold[0] and answer[0] in ("sym", "const") and _is_choice(answer, gold):
            return True, "a choice letter in either case"
        answer, answer_unit = _peel(answer, "unit")
        gold, gold_unit = _peel(gold, "unit")
        # Units are compared, never converted: to turn 1 m into 100 cm can be the very question.
        #   15 cm, 15    -> equal, an answer may name or omit the unit
        #   15 cm, 15 m  -> unequal
        if answer_unit and gold_unit and answer_unit != gold_unit:
            return False, f"units differ: {answer_unit} and {gold_unit}"
        plain_answer, answer_pct = _peel(answer, "pct")
        plain_gold, gold_pct = _peel(gold, "pct")
        # Both or neither in percent: the signs cancel.
        if bool(answer_pct) == bool(gold_pct):
            return self.values(plain_answer, plain_gold)
        # First 50% as 50 (the gold may leave out the sign), then as 1/2 (the gold may be a
        # fraction). Only the outermost sign is read in both ways, so 50% + 1 has one value.
        if self.values(plain_answer, plain_gold)[0]:
            return True, "a percentage against its number"
        return self.values(answer, gold)

    def values(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Two expressions without units: infinity, constants, or functions of letters."""
        # Infinity is a name here and no number: oo + 1 and oo - oo have no value to be compared.
        infinite = _infinity(answer), _infinity(gold)
        if any(infinite):
            return infinite[0] == infinite[1], "infinity with its sign"
        letters = _letters(answer) | _letters(gold)
        if letters:
            return self.at_points(answer, gold, letters)
        # No letters: one evaluation settles it, whereas functions need several points.
        equal, exact = _equal_at({}, answer, gold, self.work)
        if not equal and _rounds_to(answer, gold, self.work):
            return True, "a decimal that agrees to six places"
        return equal, "exact rational arithmetic" if exact else "values to many digits"

    def at_points(self, answer: tuple, gold: tuple, letters: set) -> tuple[bool, str]:
        """Two expressions in letters: equal at every point where both have a value."""
        agreed, reason = 0, None
        points = _points(letters, answer, gold)
        # Analytic expressions that agree at four random points of four-digit fractions
        # are identical, but for an accident that nobody can aim at; agreement at 1, 2 and
        # 3 would be easy to construct.
        for point in points:
            try:
                if not _equal_at(point, answer, gold, self.work)[0]:
                    # One point is a proof of inequality, so most wrong answers
                    # cost a single evaluation.
                    return False, "expressions that differ at a point"
            except CannotDecide as error:
                # Out of work is final; everything else may be the fault of this point alone.
                if self.work.left < 0:
                    raise
                reason = error  # not defined at this point
                continue
            agreed += 1
        # An answer without a value nearly everywhere, 1/(x-x) say, must not win by default.
        if agreed < 3:
            raise CannotDecide(f"too few points where both sides have a value: {reason}")
        return True, f"expressions that agree at {agreed} points"


def _items(node: tuple) -> tuple:
    """The elements of a list, set or tuple; anything else is a list of itself."""
    if node[0] in ("list", "or", "set"):
        return node[1]
    return node[3] if node[0] == "tuple" else (node,)


def _without_domain(answer: tuple, gold: tuple) -> tuple[tuple, tuple]:
    """Drop 'k in Z' from a list where only one side says so: x = k pi, k in Z is x = k pi."""
    sides = []
    for side, other in ((answer, gold), (gold, answer)):
        items = _items(side) if side[0] == "list" else ()
        #   x = k pi, k in Z   ->   ("list", (("rel", ("=",), (x, k pi)), ("rel", ("in",), (k, Z))))
        kept = tuple(item for item in items if not _is_domain(item))
        # If both sides state a domain, they must agree: Z against N is a different solution set.
        if kept and len(kept) < len(items) and not any(map(_is_domain, _items(other))):
            side = kept[0] if len(kept) == 1 else ("list", kept)
        sides.append(side)
    return sides[0], sides[1]


def _is_domain(item: tuple) -> bool:
    return item[0] == "rel" and item[1] == ("in",) and item[2][0][0] == "sym" and (
        item[2][1] in (("domain", "Z"), ("domain", "N")))


def _parts(node: tuple, op: str) -> tuple:
    """The operands of nested unions (or intersections), flat."""
    if node[0] != "setop" or node[1] != op:
        return (node,)
    return _parts(node[2], op) + _parts(node[3], op)


def _is_name(node: tuple) -> bool:
    """Can this be what an assignment names: x, m_max, f(x), f(2)?"""
    # f(2) = 7 assigns too, but f(x+1) = 7 is an equation about f, hence only letters and numbers.
    return node[0] in ("sym", "call") and not (node[0] == "call" and any(
        arg[0] not in ("sym", "num") for arg in node[2]))


def _assignment(node: tuple) -> tuple | None:
    """(name, value) of x = 5, f(x) = x^2, 5 = x or x in [0,1]; None for any other relation."""
    # "~" is \approx: x \approx 3.14 names a value just as = does.
    if node[1] not in (("=",), ("in",), ("~",)):
        return None
    left, right = node[2]
    if _is_name(left):
        return left, right
    return (right, left) if _is_name(right) and node[1] == ("=",) else None


def _assigned_names(node: tuple) -> list | None:
    """The names in a list of assignments to different letters, such as x=2, y=3."""
    if node[0] not in ("list", "or"):
        return None
    found = [_assignment(item) if item[0] == "rel" else None for item in node[1]]
    names = [pair[0] for pair in found if pair]
    # The set removes doubles: x=2, x=3 are two solutions for one letter, not two coordinates.
    return names if len(names) == len(node[1]) == len(set(names)) else None


def _by_name(node: tuple) -> tuple:
    """The values of a list of assignments, sorted by name; the items of anything else."""
    if not _assigned_names(node):
        return _items(node)
    pairs = [_assignment(item) for item in node[1]]
    # By name and not as written, so that y=3, x=2 is the point (2, 3).
    return tuple(value for _, value in sorted(pairs, key=lambda pair: str(pair[0])))


def _links(node: tuple) -> list:
    """A relation as (op, left - right) pairs, turned so that op is one of < <= = != in."""
    links = []
    for op, left, right in zip(node[1], node[2], node[2][1:]):
        if op in (">", ">="):
            #   x > 3  ->  ("<", 3 - x)        3 < x  ->  ("<", 3 - x)
            op, left, right = {">": "<", ">=": "<="}[op], right, left
        links.append(("=" if op == "~" else op, ("add", (left, ("neg", right)))))
    return links


def _is_clock(node: tuple) -> bool:
    """Could 2:30 be a time? Then 2:30 and 1:15 are not the same ratio."""
    # 2:05 parses to 5, so it cannot be told from 2:5; minutes below ten are read as ratios.
    parts = [part[1] for part in node[1] if part[0] == "num" and part[2] is None]
    return len(parts) == len(node[1]) in (2, 3) and parts[0] <= 24 and all(
        10 <= part < 60 or part == 0 for part in parts[1:])


def _is_choice(answer: tuple, gold: tuple) -> bool:
    """Single letters a to j, in either case."""
    # Only a to j are choices; K and k, or R and r, are different quantities of one problem.
    return len(answer[1]) == len(gold[1]) == 1 and answer[1].lower() == gold[1].lower() <= "j"


def _peel(node: tuple, kind: str) -> tuple:
    """The node without its outermost unit or percent sign, and what was peeled ('' if nothing)."""
    # A minus binds looser than %:  -5% is ("neg", ("pct", 5)).
    if node[0] == "neg":
        inside, peeled = _peel(node[1], kind)
        return (("neg", inside), peeled) if peeled else (node, "")
    if node[0] == "deg" and kind == "unit":
        return node[1], "degree"
    if node[0] != kind:
        return node, ""
    return node[1], node[2] if kind == "unit" else "%"


def _infinity(node: tuple) -> int:
    """+1 or -1 for the two infinities, 0 for everything else."""
    if node == ("const", "inf"):
        return 1
    return -_infinity(node[1]) if node[0] == "neg" else 0


# ---------------------------------------------------------------------------------------------
# Sets of real numbers: sorted lists of (low, low_closed, high, high_closed)

# Strings rather than Decimal infinities, which the evaluator's context would carry into sums.
_MINUS, _PLUS = "-inf", "+inf"


def _order(one, other) -> int:
    """-1, 0, 1 for two ends; balls that overlap are equal."""
    if one in (_MINUS, _PLUS) or other in (_MINUS, _PLUS):
        #   _MINUS -> -1, any number -> 0, _PLUS -> 1: enough to order ends of which one is infinite
        rank = {_MINUS: -1, _PLUS: 1}
        first = rank.get(one, 0) if isinstance(one, str) else 0
        second = rank.get(other, 0) if isinstance(other, str) else 0
        return (first > second) - (first < second)
    if not isinstance(one, Ball) and not isinstance(other, Ball):
        return (one > other) - (one < other)
    # Fifty digits and no second try: ends closer than that are written by no one.
    evaluator = _Evaluator({}, FIRST_PRECISION, _Work())
    with decimal.localcontext(evaluator.context):
        one, other = evaluator.ball(one), evaluator.ball(other)
        difference, error = one.re - other.re, one.err + other.err
        return 0 if abs(difference) <= error else 1 if difference > 0 else -1


def _end(node: tuple, work: "_Work"):
    """The value of an interval's end; raises CannotDecide unless it is a real constant."""
    sign = _infinity(node)
    if sign:
        return _PLUS if sign > 0 else _MINUS
    # An end with a letter has no place on the line: (a, b) is then compared part by part.
    if is_structure(node) or _letters(node):
        raise CannotDecide("an interval whose ends are not numbers")
    value = _Evaluator({}, FIRST_PRECISION, work).value(node)
    if isinstance(value, Ball) and not value.is_real():
        raise CannotDecide("an interval whose ends are not real")
    return value


def _region(node: tuple, work: "_Work") -> list:
    """The set of reals that a union, interval, finite set or R stands for."""
    work.spend(5)
    if node == ("domain", "R"):
        return [_Ends(_MINUS, False, _PLUS, False)]
    if node[0] == "set":
        return _merge([(end, True, end, True) for end in (_end(x, work) for x in node[1])])
    if node[0] == "tuple" and len(node[3]) == 2 and node[1] in "([" and node[2] in ")]":
        low, high = _end(node[3][0], work), _end(node[3][1], work)
        if _order(low, high) > 0:
            raise CannotDecide("an interval whose ends are in the wrong order")
        # [-oo, 1] is careless for (-oo, 1]: an infinite end is never closed. (Two intervals without
        # a union do not come here: `tuples` compares them as written.)
        closed = node[1] == "[" and low != _MINUS, node[2] == "]" and high != _PLUS
        return _merge([(low, closed[0], high, closed[1])])
    if node[0] != "setop":
        raise CannotDecide("not a set of real numbers")
    one, other = _region(node[2], work), _region(node[3], work)
    # Pieces are merged pairwise below, so the cost is charged before it arises: a chain of unions
    # must not be able to grow for free.
    work.spend(20 * (len(one) + len(other)))
    if node[1] == "cup":
        return _merge(one + other)
    # A \ B is A intersected with everything outside of B: one rule for both operations.
    return _intersection(one, other if node[1] == "cap" else _complement(other))


class _Ends(NamedTuple):
    """An interval in a form that sorts by its low end, a closed end first."""
    low: object
    low_closed: bool
    high: object
    high_closed: bool

    def __lt__(self, other):
        order = _order(self.low, other.low)
        return order < 0 or order == 0 and self.low_closed > other.low_closed


def _merge(pieces: list) -> list:
    """Sorted, without empty pieces, touching pieces joined: [0,1] and (1,2] become [0,2]."""
    merged: list = []
    for piece in sorted(_Ends(*piece) for piece in pieces):
        order = _order(piece.low, piece.high)
        # Empty: reversed ends, or (a, a) where an end is open; [a, a] is the point a.
        if order > 0 or order == 0 and not (piece.low_closed and piece.high_closed):
            continue
        if merged:
            last = merged[-1]
            gap = _order(last.high, piece.low)
            # At a touching end one closed side is enough: (0,1) U (1,2) keeps its hole at 1.
            if gap > 0 or gap == 0 and (last.high_closed or piece.low_closed):
                further = _order(piece.high, last.high)
                # The end that reaches further wins; of two equal ends, closed wins over open.
                high, closed = ((piece.high, piece.high_closed) if further > 0 else
                                (last.high, last.high_closed or further == 0
                                 and piece.high_closed))
                merged[-1] = _Ends(last.low, last.low_closed, high, closed)
                continue
        merged.append(piece)
    return merged


def _intersection(one: list, other: list) -> list:
    """What both lists of pieces share."""
    pieces = []
    for a in one:
        for b in other:
            low = b if a < b else a  # the later start; at equal ends the open one
            first, second = (a, b) if _order(a.high, b.high) < 0 else (b, a)
            closed = first.high_closed and (_order(a.high, b.high) != 0 or second.high_closed)
            pieces.append((low.low, low.low_closed, first.high, closed))
    return _merge(pieces)


def _complement(region: list) -> list:
    """The reals that are not in a region: the gaps between its pieces."""
    # Piece by piece: each end becomes the end of a gap, and what was closed there is open now.
    pieces, low, low_closed = [], _MINUS, False
    for piece in region:
        pieces.append((low, low_closed, piece.low, not piece.low_closed))
        low, low_closed = piece.high, not piece.high_closed
    pieces.append((low, low_closed, _PLUS, False))
    return _merge(pieces)


def _same_region(one: list, other: list) -> bool:
    """Equal ends, equally closed, piece by piece: both sides are merged and sorted."""
    # Possible only because `_merge` leaves one form of each set: [0,1] U (1,2] is stored as [0,2].
    return len(one) == len(other) and all(
        a.low_closed == b.low_closed and a.high_closed == b.high_closed
        and _order(a.low, b.low) == 0 == _order(a.high, b.high) for a, b in zip(one, other))


def _solved(node: tuple, work: "_Work") -> list:
    """The reals that satisfy a solved inequality (c < x <= d, x != c, several joined by 'or')."""
    if node[0] in ("or", "list"):
        # "x>1, x<3" may mean both or either: a comma does not say.
        if node[0] == "list":
            raise CannotDecide("inequalities that are not joined by 'or'")
        return _merge([piece for item in node[1] for piece in _solved(item, work)])
    letters = set().union(*(_letters(side) for side in node[2]))
    region = [_Ends(_MINUS, False, _PLUS, False)]
    for op, left, right in zip(node[1], node[2], node[2][1:]):
        #   3 < x becomes x > 3, so that the letter is on the left
        if not _is_name(left):
            left, right = right, left
            op = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(op, op)
        # One letter, alone on its side: 2x < 6 as gold is not solved, and solving is not done here.
        if not _is_name(left) or len(letters) != 1:
            raise CannotDecide("an inequality that is not solved")
        end = _end(right, work)
        piece = {"<": [(_MINUS, False, end, False)], "<=": [(_MINUS, False, end, True)],
                 ">": [(end, False, _PLUS, False)], ">=": [(end, True, _PLUS, False)],
                 "!=": [(_MINUS, False, end, False), (end, False, _PLUS, False)]}.get(op)
        if piece is None:
            raise CannotDecide("a relation that is not an inequality")
        # A chain holds where all its links hold: 1 < x <= 4 is (1, oo) intersected with (-oo, 4].
        region = _intersection(region, _merge(piece))
    return region


# ---------------------------------------------------------------------------------------------
# Letters and the points where expressions are compared

_WHOLE = {"fact", "fact2", "binom"}  # what stands in these is a whole number
_INTEGER_LETTERS = set("ijklmnpqdrstNMKLT")  # in a floor or above -1, these mean whole numbers


def _letters(node) -> set:
    """The free letters of an expression."""
    # A name counts whole: x_1 and x_2 are two letters, and the index is no letter by itself.
    if node[0] == "sym":
        return {node[1]}
    if node[0] in ("num", "const"):
        return set()
    found: set = set()
    for part in node[1:]:
        if isinstance(part, tuple) and part:
            # A child is a node (its first entry names a kind) or a tuple of
            # nodes, such as add's terms.
            if isinstance(part[0], str):
                found |= _letters(part)
            else:
                for item in part:
                    if isinstance(item, tuple):
                        found |= _letters(item)
    # The k of a sum is bound: given a value from outside, sum k and sum j would differ.
    if node[0] in ("sum", "prod"):
        found.discard(node[1])
    return found


def _counted(node) -> tuple[set, set]:
    """(letters that stand for whole numbers, other letters under a floor or ceiling).

    n! and floor(n/2) and (-1)^n are only meant for whole n; floor(x) is meant for all x.
    """
    if not isinstance(node, tuple) or not node:
        return set(), set()
    # Only sure cases are whole for any name: x! has no other value here, gcd(a,b) neither.
    if node[0] in _WHOLE or node[0] == "fn" and node[1] in ("gcd", "lcm"):
        return _letters(node), set()
    if node[0] in ("sum", "prod"):
        return _letters(node[2]) | _letters(node[3]), set()
    letters = set()
    if node[0] in ("floor", "ceil"):
        letters = _letters(node[1])
    elif node[0] == "pow" and node[1][0] == "neg" and not _letters(node[1]):
        # (-1)^n: at n = 1234/5678 it would be complex, and (-1)^(2n) = 1 would be denied.
        #   pow of neg of something without letters; the exponent's letters become whole
        letters = _letters(node[2])
    whole = {name for name in letters if name[0] in _INTEGER_LETTERS}
    # floor(x) stays a function of real x: at whole x alone it would be equal to x.
    stepped = letters - whole if node[0] in ("floor", "ceil") else set()
    for part in node:
        more = _counted(part)
        whole, stepped = whole | more[0], stepped | more[1]
    return whole, stepped


def _hash(text: str, salt: int) -> int:
    """Fixed pseudo-random 32 bits; Python's own hash changes from run to run."""
    # Fixed, so that a verdict never changes between two runs, machines or processes.
    # A model cannot aim at the points: an expression equal to gold at all of them is
    # as hard to find as the answer.
    return crc32(f"{salt}:{text}:{salt * 7919}".encode())


def _points(letters: set, answer: tuple, gold: tuple) -> list[dict]:
    """Where to compare: rationals of both signs; whole numbers for letters that count."""
    whole, stepped = map(set.union, _counted(answer), _counted(gold))
    points = []
    # Four points for smooth expressions; twenty where steps are, as steps differ at few places:
    # floor(sqrt(n)) and floor(n/2) agree at n = 2, 3, 4 and 5, and part only then.
    for k in range(20 if whole or stepped else 4):
        point = {}
        for name in letters:
            bits = _hash(name, k)
            # Both signs for every letter, so that sqrt(x^2) and x are told apart.
            sign = 1 if (bits >> 28) + k & 1 else -1
            if name in whole:
                # One letter takes all small values and some large: floors differ at few of them.
                # A fixed ladder rather than random: 1 to 16, then powers and squares,
                # where floors and roots step.
                single = k + 1 if k < 16 else (25, 32, 64, 100)[k - 16]
                # Several counting letters: small, since n! and binomials grow fast,
                # and 15 keeps them cheap.
                point[name] = single if len(whole) == 1 else 1 + bits % 15
            elif name in stepped and k % 2:
                point[name] = sign * (bits % 10)  # floor(x) and ceil(x) - 1 differ here only
            else:
                # About 0.1 to 10, never 0 or 1 but by accident, where x and x^2 would meet; four
                # digits each, so that exact arithmetic on it stays short.
                point[name] = sign * Fraction(1000 + bits % 8999, 1000 + (bits >> 13) % 8999)
        points.append(point)
    return points


# ---------------------------------------------------------------------------------------------
# Numbers: int and Fraction are exact; a Ball is a complex number with an error bound

class _Work:
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


def _is_zero(value) -> bool:
    """Is it zero, or, if inexact, could it be?"""
    return value.is_null() if isinstance(value, Ball) else value == 0


def _agree(one, other) -> bool:
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


def _equal_at(point: dict, answer: tuple, gold: tuple, work: _Work) -> tuple[bool, bool]:
    """(equal, exactly) at one point, with as many digits as it takes; raises CannotDecide."""
    # At most two or three rounds: cheap digits first, more only where `need` asks for them.
    precision = FIRST_PRECISION
    while True:
        evaluator = _Evaluator(point, precision, work)
        one, other = evaluator.value(answer), evaluator.value(gold)
        exact = not isinstance(one, Ball) and not isinstance(other, Ball)
        with decimal.localcontext(evaluator.context):
            if not exact:
                one, other = evaluator.ball(one), evaluator.ball(other)
            # Different at any precision is final, since the balls hold the true values.
            if not _agree(one, other):
                return False, exact
        # Equal is only believed when nothing written in the answers lies below the last digit kept.
        #   1 + 10^-80 pi against 1: equal at 50 digits, need = 100, unequal at 120
        if exact or evaluator.need <= precision:
            return True, exact
        # They agree, but something written in them is smaller than the last digit kept.
        precision = evaluator.need + 20
        if precision > MAX_PRECISION:
            raise CannotDecide(f"more than {MAX_PRECISION} digits would be needed")


def _rounds_to(answer: tuple, gold: tuple, work: _Work) -> bool:
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
    evaluator = _Evaluator({}, FIRST_PRECISION, work)
    value, rounded = evaluator.value(exact), evaluator.value(written)
    if isinstance(value, Ball):
        if not value.is_real():
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


class _Evaluator:
    """The value of an expression at one point, to one precision.

    `need` grows to the number of digits below which something written would go unseen: an addend
    too small for the digits kept, or a fraction with more digits than that.
    """

    def __init__(self, point: dict, precision: int, work: _Work):
        # One evaluator per point and precision: it remembers `need` and nothing of other points.
        self.point, self.precision, self.work, self.need = point, precision, work, 0
        # Are we inside a sine or the like? Only there does a degree sign mean pi/180.
        self.in_trig = False
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
        # At a random point long fractions are made by the point, not written by anyone.
        # 20 digits beyond its own length tell the fraction from every other that could
        # be written so. The cap keeps a power at a random point, of thousands of
        # digits, from asking for thousands.
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
            # Fraction wants a positive denominator, so a sign moves up.
            return Fraction(value.denominator, value.numerator) if value > 0 else Fraction(
                -value.denominator, -value.numerator)
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
        if _is_zero(base):
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
        if _is_zero(base) and n <= 0:
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
        self.heavy()
        # 3 |e^z| err below holds for small errors only; a wide ball has no digits to offer anyway.
        if value.err > Decimal("1e-10"):
            raise CannotDecide("not enough digits left")
        self.tiny(value)
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
        """cos and sin of a real number: reduce to an eighth of a turn, halve, Taylor, double."""
        #   angle 1e30: its last turn is only known with 30 digits more; 1e100 is past any meaning
        shift = max(angle.adjusted(), 0)
        if shift > 100:
            raise CannotDecide("an angle too large")
        self.work.spend(30 + self.precision * self.precision // 300)
        with decimal.localcontext(self.context) as context:
            # The digits before the point are lost in the reduction, and the eight
            # doublings lose some more.
            context.prec = self.precision + shift + 12
            half_pi = _pi(context.prec) / 2
            quarters = int((angle / half_pi).to_integral_value())
            # Divided by 2^8: at most 0.0031 is left, where each Taylor term brings five digits.
            rest = (angle - quarters * half_pi) / 256
            square, term, sine, cosine, k = rest * rest, rest, rest, _ONE, 1
            limit = Decimal(10) ** -context.prec
            even = -square / 2
            while abs(even) > limit:
                cosine += even
                term = -term * square / ((k + 1) * (k + 2))
                sine += term
                k += 2
                even = -even * square / (k * (k + 1))
            #   cos 2x = 2 cos^2 x - 1,   sin 2x = 2 sin x cos x, eight times
            for _ in range(8):
                cosine, sine = 2 * cosine * cosine - 1, 2 * sine * cosine
        # Back from the quarter turns that were taken away: (cos, sin) of x,
        # x + 90, 180, 270 degrees.
        turned = ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))
        re, im = turned[quarters % 4]
        # Unary plus rounds to the precision outside, that of the caller.
        return +re, +im

    def atan2(self, y: Decimal, x: Decimal) -> Decimal:
        """The angle of x + iy in (-pi, pi], by halving the angle and a Taylor series."""
        self.work.spend(30 + self.precision * self.precision // 300)
        with decimal.localcontext(self.context) as context:
            context.prec = self.precision + 10
            # Steep angles are measured from the other axis, so that the ratio is at most 1 in size.
            if abs(y) > abs(x):
                ratio, base = -x / y, _pi(context.prec) / 2 * (1 if y > 0 else -1)
            else:
                ratio, base = y / x, _ZERO if x > 0 else _pi(context.prec) * (1 if y >= 0 else -1)
            # Five halvings, tan(a/2) = tan a / (1 + sqrt(1 + tan^2 a)): the
            # ratio falls below 0.025.
            for _ in range(5):
                ratio = ratio / (1 + (1 + ratio * ratio).sqrt())
            square, term, total, k = ratio * ratio, ratio, ratio, 1
            limit = Decimal(10) ** -context.prec
            while abs(term) > limit:
                term = -term * square
                k += 2
                total += term / k
            #   32 = 2^5 undoes the halvings
            result = base + 32 * total
        return +result

    def cosine_sine(self, value):
        """cos and sin as balls, of real or complex numbers."""
        value = self.ball(value)
        if value.err > Decimal("1e-10"):
            raise CannotDecide("not enough digits left")
        #   cos z = (e^iz + e^-iz)/2,   sin z = (e^iz - e^-iz)/2i
        if value.im:
            # i (a + bi) = -b + ai, put together by hand: no rounding.
            turn = self.exp(Ball(-value.im, value.re, value.err))
            back = self.inverse(turn)
            half, half_i = Fraction(1, 2), Ball(_ZERO, Decimal("-0.5"), _ZERO)
            return (self.mul(half, self.add(turn, back)),
                    self.mul(half_i, self.add(turn, self.neg(back))))
        # cos(10^-50) is 1 to a hundred digits: `need` must hear of it.
        self.tiny(value)
        cosine, sine = self.cos_sin(value.re)
        # The absolute error of both is that of the angle, however small they are themselves.
        error = 2 * value.err + self.ulp(_ONE)
        return Ball(cosine, _ZERO, error), Ball(sine, _ZERO, error)

    # -- one method a kind of node ------------------------------------------------------------
    def do_num(self, value, places):
        """A literal is exact."""
        # `places` serves `_rounds_to` alone: by value 0.50 is 1/2.
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
        """n over k, exact, for 0 <= k <= n."""
        n, k = self.whole(n, "a binomial"), self.whole(k, "a binomial")
        # The length of n over k is at most k log2 n bits; min(k, n - k) because both give the same.
        if not 0 <= k <= n or min(k, n - k) * n.bit_length() > MAX_BITS:
            raise CannotDecide("a binomial outside its limits")
        k = min(k, n - k)
        self.work.spend(2 + k * k * n.bit_length() // 10000)
        return math.comb(n, k)

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
        # Near a step the digits decide: a value known to 1e-20 is on a side, or at a whole number.
        if value.im or value.err > Decimal("1e-20") or value.size() > Decimal("1e18"):
            raise CannotDecide("a floor of a number that is not real or not known well enough")
        nearest = value.re.to_integral_value()
        # Within its error of a whole number. Exactly on the step is the
        # only likely reason for that.
        if abs(value.re - nearest) <= value.err:
            return int(nearest)  # log_2 8 is 3 to all the digits there are
        return math.ceil(value.re) if up else math.floor(value.re)

    def do_ceil(self, x):
        return self.do_floor(x, True)

    def do_log(self, base, x):
        """ln x / ln base."""
        numerator = self.log(self.evaluate(x))
        # ln needs no division by ln e, and so keeps one error less.
        if base == ("const", "e"):
            return numerator
        return self.mul(numerator, self.inverse(self.log(self.evaluate(base))))

    def do_pct(self, x):
        """In arithmetic, 5% is 5/100."""
        # A lone percent sign is peeled off before; here is 20% * 50 = 10.
        return self.mul(self.evaluate(x), Fraction(1, 100))

    def do_unit(self, x, name):
        """A unit inside a sum carries no value."""
        #   (5 cm) + 3 is 8; only the unit of a whole answer is compared, by `scalars`
        return self.evaluate(x)

    def do_deg(self, x):
        """Degrees are plain numbers, except in a trigonometric function."""
        #   90 degrees against 90: equal; sin(30 degrees): 30 pi/180
        value = self.evaluate(x)
        if not self.in_trig:
            return value
        return self.mul(self.mul(value, self.do_const("pi")), Fraction(1, 180))

    def do_call(self, name, args):
        """An unknown function: a pseudo-random number that depends on its arguments only."""
        # f(x+1) and f(1+x) become the same number, f(x) and f(x+1) different ones, so f behaves as
        # a function nobody knows anything about: no identity about f holds that was not written.
        keys = []
        for arg in args:
            value = self.evaluate(arg)
            if isinstance(value, Ball):
                # 25 figures: two roundings of the same argument must give one text,
                # hence far fewer than known.
                keys.append(f"{value.re:.25e},{value.im:.15f}")
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
        """Functions of one argument and, by `several`, of many."""
        if name in ("gcd", "lcm", "max", "min"):
            return self.several(name, [self.evaluate(arg) for arg in args])
        if name in _CIRCULAR:
            # Saved and restored, for a sine can stand in a sine: the inner one
            # ends, the outer goes on.
            outer, self.in_trig = self.in_trig, True
            value = self.evaluate(args[0])
            self.in_trig = outer
            return self.circular(name, value)
        value = self.evaluate(args[0])
        if name in ("sinh", "cosh", "tanh", "coth"):
            return self.hyperbolic(name, value)
        return self.inverse_circular(name, value)

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

    def circular(self, name: str, value):
        """The trigonometric functions as quotients of cos and sin."""
        # sin 0 is exactly 0: as a ball around zero it could not be divided, counted or raised to.
        if _is_exact_zero(value) and name in ("sin", "tan"):
            return 0
        cosine, sine = self.cosine_sine(value)
        if name in ("sin", "cos"):
            return sine if name == "sin" else cosine
        if name == "cis":
            return self.add(cosine, self.mul(Ball(_ZERO, _ONE, _ZERO), sine))
        if name in ("sec", "csc"):
            return self.inverse(cosine if name == "sec" else sine)
        #   tan = sin/cos, cot = cos/sin; where the divisor could be zero there is no value
        over, under = (sine, cosine) if name == "tan" else (cosine, sine)
        return self.mul(over, self.inverse(under))

    def hyperbolic(self, name: str, value):
        """As quotients of e^x + e^-x and e^x - e^-x."""
        # One exponential serves all four: e^-x is its inverse.
        grown = self.exp(value)
        back = self.inverse(grown)
        plus, minus = self.add(grown, back), self.add(grown, self.neg(back))
        half = Fraction(1, 2)
        if name in ("sinh", "cosh"):
            return self.mul(half, minus if name == "sinh" else plus)
        return self.mul(*((minus, self.inverse(plus)) if name == "tanh"
                          else (plus, self.inverse(minus))))

    def inverse_circular(self, name: str, value):
        """By complex logarithms; arcsin, arctan of a real argument come out real within error."""
        if name in ("arcsec", "arccsc", "arccot"):
            #   arcsec x = arccos 1/x,   arccsc x = arcsin 1/x,   arccot x = arctan 1/x
            name, value = {"arcsec": "arccos", "arccsc": "arcsin", "arccot": "arctan"}[name], (
                self.inverse(value))
        unit = Ball(_ZERO, _ONE, _ZERO)
        turned = self.mul(unit, self.ball(value))
        #   arctan z = i/2 (log(1 - iz) - log(1 + iz))
        if name == "arctan":
            low, high = self.log(self.add(1, self.neg(turned))), self.log(self.add(1, turned))
            return self.mul(Ball(_ZERO, Decimal("0.5"), _ZERO), self.add(low, self.neg(high)))
        #   arcsin z = -i log(iz + sqrt(1 - z^2)),   arccos z = pi/2 - arcsin z
        # The same formulas hold for real and complex z, and beyond 1, where arcsin is complex.
        root = self.power(self.add(1, self.neg(self.mul(value, value))), Fraction(1, 2))
        result = self.neg(self.mul(unit, self.log(self.add(turned, root))))
        if name == "arcsin":
            return result
        return self.add(self.mul(Fraction(1, 2), self.do_const("pi")), self.neg(result))


_CIRCULAR = {"sin", "cos", "tan", "cot", "sec", "csc", "cis"}


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
