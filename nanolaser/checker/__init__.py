r"""The rule-based verifier: the answer out of a solution's text, and whether two answers are equal.

It decides the reward r_v, so a wrong True teaches a model to cheat and a wrong False hides what it
learned. It is exact where it can be (fractions), rigorous where it cannot (every inexact number
carries its error bound), bounded always (no input takes long), and says why: see `explain`.

The folder works by itself, and is a reward function for other trainers (see docs/checker.md).
Reading order: this file (the box in a text, the public questions); parse.py (text to tree, the
grammar and the tables of words); compare.py (tree against tree); evaluate.py (the value of an
expression).

How two answers are compared, first rule that applies:
  1. the same text, or the same tree: equal;
  2. no tree on one side: equal only as normalised text;
  3. an option's letter, or labelled values against each other or against bare ones;
  4. structure against structure: list, set, tuple or interval, union, matrix, relation, ratio,
     number base, words, each by the rule of its own function in compare.py;
  5. expressions: both sides are evaluated, once if they have no letters, otherwise at fixed
     pseudo-random points, of both signs and on every stretch between the constants that occur.
     Rational arithmetic is exact; roots, pi, e, i, logarithms and trigonometry are complex balls
     of 50 digits or more. One point where they differ proves them unequal; equal means equal at
     every point where the gold has a value, with more digits than the numbers written in the
     answers could hide behind.
Beyond a limit the answer is "cannot decide", which counts as unequal. What is ambiguous (is P(3) a
product? is n whole?) is read as the gold shows it.

Where graders disagree (percent against number, order of lists, restated equations, units) the
policy is the tables of docs/checker.md, every line of which is tested.
"""

import re
from decimal import Decimal
from typing import NamedTuple

from .compare import Comparison, without_domain
from .evaluate import CannotDecide
from .parse import MAX_CHARS, ParseError, clean, closing_brace, parse, unbox

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
# What may stand between boxes that are one answer: $\boxed{3}$ and $\boxed{5}$.
_JOINT = re.compile(r"(?:[ \t$,;]|\\[,;:! ()\[\]]|\\q?quad|and|or"
                    r"|\\text\s?\{\s*(?:and|or)\s*\}){0,40}\n?")
# A text of a thousand unclosed boxes must cost no more than this many windows.
MAX_BOX_TRIES = 8


def extract_answer(text: str | None, strict: bool = False) -> str | None:
    r"""Return what the last \boxed{...} of a text holds, or None where there is no box.

    Braces are matched; \fbox{5}, \boxed 5 and nested boxes are understood; a box that never closes
    is passed over. Boxes with nothing but commas or "and" between them are one list, "3, 5". With
    strict, the rule of the paper's training reward: exactly one "\boxed{", otherwise None.
    """
    # Two boxes are how a policy hedges ("\boxed{4} or \boxed{5}"): with strict that earns nothing.
    # Counted as the paper's gate counts, with the brace.
    if not text or strict and text.count("\\boxed{") != 1:
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
            return _with_boxes_before(text, end, content) if alone and not strict else content
    return None


def _with_boxes_before(text: str, start: int, content: str) -> str:
    r"""The answer of a last box and of those that lead up to it: "3, 5" of \boxed{3}, \boxed{5}."""
    # A hedge, "\boxed{4} or \boxed{5}", becomes the list that it is.
    contents = [content]
    for _ in range(MAX_BOX_TRIES):
        window = text[max(0, start - BOX_WINDOW):start]
        before = max(window.rfind("\\boxed{"), window.rfind("\\fbox{"))
        opening = window.find("{", before) if before >= 0 else -1
        closing = closing_brace(window, opening) if before >= 0 else -1
        if closing < 0 or not _JOINT.fullmatch(window, closing + 1):
            break
        other, start = window[opening + 1:closing].strip(), start - len(window) + before
        # The same answer twice, or in two spellings ("or"), is one.
        if not any(is_equivalent(other, known) for known in contents):
            contents.insert(0, other)
    return ", ".join(contents)


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


def is_correct(response: str | None, gold: str, strict: bool = False) -> bool:
    r"""The reward r_v in {0, 1} as a bool: does the last \boxed{...} of a response equal gold?"""
    # No box, no reward: a right number somewhere in the prose is not an answer, and to search for
    # it would pay a policy for listing many numbers.
    answer = extract_answer(response, strict)
    return answer is not None and is_equivalent(answer, gold)


# The columns in which data sets keep the gold answer; the first that is there counts. `solution`
# comes last: beside an answer it is the worked solution, alone it is what TRL's own rewards read.
GOLD_COLUMNS = ("answer", "final_answer", "ground_truth", "gold", "target", "solution")


def reward_function(prompts, completions, **columns) -> list[float]:
    """The reward of TRL's trainers: r_v as 1.0 or 0.0 for each completion.

    prompts and completions: n texts, or n lists of messages, of which the last one counts; columns:
    lists of n values, among them the golds (see GOLD_COLUMNS; raises ValueError if none is).
    """
    name = next((name for name in GOLD_COLUMNS if name in columns), None)
    if name is None:
        raise ValueError(f"no column holds the gold answers: name one of {', '.join(columns)} "
                         f"{GOLD_COLUMNS[0]!r} (or {', '.join(GOLD_COLUMNS[1:])})")
    return [compute_score(None, _completion_text(completion), gold)
            for completion, gold in zip(completions, columns[name], strict=True)]


def compute_score(data_source, solution_str: str, ground_truth, extra_info=None) -> float:
    r"""The reward of verl's trainers: r_v as 1.0 or 0.0, whatever the data source.

    The gold is the answer itself, or a worked solution with it in \boxed{} or after GSM8K's ####.
    """
    #   ["2", "3"]  ->  "2, 3"
    gold = ", ".join(map(str, ground_truth)) if isinstance(ground_truth, (list, tuple)) else (
        _text(ground_truth))
    gold = extract_answer(gold) or gold.rpartition("####")[2]
    return float(is_correct(solution_str, gold))


def _completion_text(completion) -> str:
    """The text of a completion that is a text, or messages whose content is text or parts."""
    content = completion
    if not isinstance(completion, str):
        content = completion[-1].get("content") if completion else ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return content or ""  # a call of a tool has no content


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
        reading: dict = {}
        gold_tree = parse(gold, reading)
        if gold_tree[0] == "sym" and gold_tree[1] in "ABCDEFGHIJ" and (option := _option(answer)):
            return option == gold_tree[1], "the letter of an option"
        answer_tree = parse(answer, reading)
    except ParseError as error:
        # Two texts that normalise to nothing (only spaces and $) are not equal either.
        same = bool(_normalised(gold)) and _normalised(answer) == _normalised(gold)
        return same, f"compared as text, because one side does not parse: {error}"
    # Safe for any kind of tree, because the trees are plain tuples of strings and exact numbers.
    # Never by value: 0/0 against 0/0 has the same tree, and no value at all.
    if answer_tree == gold_tree:
        return True, "the same structure"
    answer_tree, gold_tree = without_domain(answer_tree, gold_tree)
    try:
        return Comparison().same(answer_tree, gold_tree)
    except CannotDecide as error:
        return False, f"cannot decide: {error}"


_TEXT_FACE = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s?\{([^{}]*)\}")
_NOISE = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\$")
_SPACE = re.compile(r"(?:\\[,;:! ]|~|\s)+")
_IDLE_SPACE = re.compile(r"(?<!\w) | (?!\w)")


def _normalised(text: str) -> str:
    """A text without faces and without spaces that mean nothing, for golds that are prose."""
    # Spaces between words and between digits mean something: "now here" is not "nowhere", and
    # 1 000 is not 1000. Braces stay, they can matter.
    text = _SPACE.sub(" ", _NOISE.sub("", _TEXT_FACE.sub(r"\1", clean(text))))
    return _IDLE_SPACE.sub("", text).replace("\\dfrac", "\\frac")


# "option B", "(B) Paris", "B) 12", "B. 12": the letter, with a word before it or a mark after it.
_OPTION = re.compile(r"(?P<word>(?:option|choice|answer) ?)?(?P<open>\()?(?P<letter>[A-J])"
                     r"(?![A-Za-z])(?P<mark>\)|[.:](?= ))? ?(?P<rest>.*)", re.I | re.S)
# A second option in what follows: "B) or C)", "B) Paris. C) Rome", "option B or C", "A) B".
_ANOTHER = re.compile(r"(?<![A-Za-z\\])[A-J][).:](?![A-Za-z])|(?:^|,|\b(?:and|or|nor|not)\b) ?"
                      r"(?:option |choice )?\(?[A-J]\b(?!-)|^ ?(?:,|and\b|or\b)")


def _option(answer: str) -> str | None:
    """The letter of the one option that an answer names, with or without the option's text."""
    text = _SPACE.sub(" ", _NOISE.sub("", _TEXT_FACE.sub(r"\1", clean(answer)))).strip()
    match = _OPTION.fullmatch(text)
    if not match or not (match["mark"] or match["word"] and not match["rest"]) or (
            match["open"] and match["mark"] != ")") or _ANOTHER.search(match["rest"]):
        return None
    return match["letter"].upper()


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
        # A float would overflow at 1e309.
        text = str(node[1] if node[2] is None else
                   Decimal(node[1].numerator) / Decimal(node[1].denominator))
        return text if len(text) < 40 else text[:37] + "..."
    if node and node[0] in ("sym", "const", "text", "domain") and len(node) == 2:
        return node[1]
    head, rest = (node[0], node[1:]) if node and isinstance(node[0], str) else ("", node)
    return f"{head}({', '.join(show(part) for part in rest)})"
