r"""Two trees compared: lists, sets, tuples, matrices, ratios, relations, regions, expressions.

Reading order: `Comparison.same` picks the rule for the two kinds of tree, one method a rule; then
small questions about trees; then the sets of real numbers.
"""

import decimal
import operator
from functools import cmp_to_key

from .evaluate import (FIRST_PRECISION, MAX_PRECISION, Ball, CannotDecide, Evaluator, NoValue,
                       Work, agree, equal_at, letters_of, points_for, rounds_to)
from .parse import is_structure

# ---------------------------------------------------------------------------------------------
# Structures

class Comparison:
    """One comparison of two trees; holds the work that is left to it, and nothing else."""

    # A fresh budget for each comparison: what a pair costs cannot depend on the pairs before it.
    def __init__(self):
        self.work = Work()
        # How deep inside structures we are: some rules hold for a whole answer only.
        self.inside = 0
        self.exact = False  # inside a matrix, where no decimal stands for a rounded number

    def same(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Equal or not, and the rule that decided; raises CannotDecide."""
        self.work.spend(2)
        if answer == gold:
            return True, "the same structure"
        # A node's first entry is its kind.
        #   kinds {"rel", "num"}     x=5  against 5       -> relations
        #   kinds {"list", "set"}    1, 2 against \{1,2\} -> lists
        kinds = {answer[0], gold[0]}
        if not kinds.isdisjoint(("list", "or", "rel")):
            verdict = self.assignments(answer, gold)
            if verdict is not None:
                return verdict
        for kind, rule in _RULES.items():
            if kind in kinds:
                return rule(self, answer, gold)
        # Equal words, times and numbers in a base are equal trees, met above. 42 for 52_8 would let
        # a model skip the conversion that the question asks for, in either direction.
        if is_structure(answer) or is_structure(gold):
            return False, "words, times, numbers in a base: compared as they stand"
        return self.scalars(answer, gold)

    def equal(self, answer: tuple, gold: tuple) -> bool:
        """The verdict on two parts of structures."""
        self.inside += 1
        verdict = self.same(answer, gold)[0]
        self.inside -= 1
        return verdict

    def matched(self, answers: tuple, golds: tuple, equal=None) -> bool:
        """Can the two lists be paired off? Greedy is right, because equality is transitive."""
        equal = equal or self.equal
        # Against hedging: 3, 5, 7 for gold 3, 5 lists the right values and one more, and is wrong.
        if len(answers) != len(golds):
            return False
        left = list(answers)
        for gold in golds:
            # Usually the order is the same, so the first one left over is the partner.
            found = next((k for k, answer in enumerate(left) if equal(answer, gold)), None)
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

    def assignments(self, answer: tuple, gold: tuple) -> tuple[bool, str] | None:
        """Labelled values against each other or against bare ones; None where no label stands."""
        one, other = self.table(answer), self.table(gold, trusted=True)
        if one and other:
            # Both say what their values are of: y=5 is not x=5, but y=9, x=2 is x=2, y=9.
            names, others = tuple(one[1][0]), tuple(other[1][0])
            if set(names) == set(others):
                names = others
            elif not len(names) == len(others) == 1 or names[0][0] == "sym" or (
                    not self.equal(names[0], others[0])):  # |PQ| and |QP|
                return None  # the rules for equations decide
            return self.matched(_rows(one[1], names), _rows(other[1], others)), "values by name"
        bare = gold if one else answer
        if not one and not other or any(item[0] == "rel" for item in (bare, *_items(bare))):
            return None
        order, rows = one or other
        if len(rows) == 1 < len(rows[0]) and "or" in (answer[0], gold[0]):
            return False, "alternatives for different letters"
        # x_1=3, x_2=5 are the solutions of one unknown, where the other side shows no order.
        if len(rows) == 1 < len(rows[0]) and bare[0] in ("list", "or", "set") and (
                len({str(name[-1]).split("_")[0] for name in rows[0]}) == 1):
            found = tuple(rows[0].values())
        elif order is None:
            return False, "names in an order of their own"
        else:
            found = _rows(rows, order)
        labelled = found[0] if len(found) == 1 else ("list", found)
        #   x=5 -> 5      x=2, x=9 -> the list 2, 9      m=1,n=2;m=3,n=2 -> the list (1,2), (3,2)
        equal, rule = self.same(*((labelled, gold) if one else (answer, labelled)))
        return equal, f"the values of {len(rows)} assignments; {rule}"

    def table(self, node: tuple, trusted: bool = False) -> tuple[tuple, list] | None:
        r"""(order of the names, {name: value} of each solution) of assignments, or None.

        The order is that of the letters, or of a tuple (\rho, \theta) as written; None where a
        tuple (n, m) turns its letters round, and nobody knows what (4, 7) would be.
        """
        rows: list[dict] = []
        label = None
        for item in node[1] if node[0] in ("list", "or", "set") else (node,):
            if item[0] == "rel":
                assigned = self.assigned(item, trusted)
                if assigned is None:
                    return None
                label, value = assigned
            else:
                value = item  # the 9 of x=2, 9 and the (3,2) of (m,n)=(1,2), (3,2)
            if label is None:
                return None
            # x in {2, 9} and (m,n) in {(1,2), (3,2)}: one solution an element
            several = item[0] == "rel" and item[1] == ("in",) and value[0] == "set"
            for one in value[1] if several else (value,):
                if label[0] == "tuple":
                    if one[:3] != ("tuple", "(", ")") or not (
                            len(set(label[3])) == len(label[3]) == len(one[3])):
                        return None
                    rows.append(dict(zip(label[3], one[3])))
                #   m=1, n=2, m=3, n=2: the second m begins another solution
                elif rows and not several and label not in rows[-1]:
                    rows[-1][label] = one
                else:
                    rows.append({label: one})
        if not rows or any(row.keys() != rows[0].keys() for row in rows):
            return None
        if label[0] != "tuple":
            return tuple(sorted(rows[0], key=str)), rows
        latin = [name[1] for name in label[3] if name[1][1:2] in ("", "_")]
        return (label[3] if latin == sorted(latin) else None), rows

    def assigned(self, node: tuple, trusted: bool) -> tuple | None:
        """(label, value) of x = 5, |PQ| = 6, (m,n) = (4,7), 5 = x, x = 5+6 = 11 or x in [0,1]."""
        # "~" is \approx: x \approx 3.14 names a value just as = does.
        if node[1] != ("in",) and any(op not in ("=", "~") for op in node[1]):
            return None
        sides = node[2]
        if not is_label(sides[0]):
            # 5 = x, where the letter stands alone
            if len(sides) == 2 and sides[1][0] in ("sym", "call") and is_label(sides[1]) and (
                    node[1] != ("in",)):
                return sides[1], sides[0]
            return None
        # A gold x = 5+6 = 11 shows its working; a value alone would not show which was asked for.
        if trusted and len(sides) > 2 or not self.true_chain(sides[1:]):
            return None
        return sides[0], sides[-1]  # the last member is the result: x = 5+6 = 11 answers 11

    def true_chain(self, sides: tuple) -> bool:
        """Are all members without letters equal, and the last one of them, if there are any?"""
        # x = 5+7 = 11 is not 11, otherwise any wrong derivation that ends in a guess at the gold
        # would pass. Members with letters are left out, they can be definitions.
        closed = [side for side in sides if side[0] != "text" and not letters_of(side)]
        return not closed or closed[-1] is sides[-1] and all(
            self.equal(side, closed[0]) for side in closed[1:])

    def lists(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """A bare list against a list, a set or a tuple."""
        #   list  3, 5 -> (3, 5)      set  \{3,5\} -> (3, 5)      tuple  (3,5) -> (3, 5)
        answers, golds = _items(answer), _items(gold)
        if "set" in (answer[0], gold[0]):
            return self.covered(answers, golds), "the same set of elements"
        if "tuple" in (answer[0], gold[0]) and not all(item[0] == "rel" for item in golds):
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
        if answer[0] in ("list", "or") and gold[0] in ("list", "or") and (
                self.matched(answers, golds)):
            return True, "the same elements in any order"
        # x<1 or x>3 is a region of the line, which |x-2|>1 is only after some work.
        return self.regions(answer, gold)

    def regions(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Solved inequalities and memberships as sets of reals; intervals only for such a gold."""
        # The order of the roles matters: gold [-2,7], answer -2<=x<=7: it can be the question,
        # copied. The letter must be the same where both sides have one: x>2 is not f(x)>2.
        about, gold_about = _subjects(answer), _subjects(gold)
        if len(gold_about) != 1 or about and about != gold_about:
            return False, "an inequality or several answers against something else"
        return same_region(answer, gold, self.work), "the same solutions"

    def sets(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Sets against sets; with a tuple or a single value the policy table decides."""
        if answer[0] == gold[0] == "set":
            return self.covered(answer[1], gold[1]), "the same set of elements"
        # A set in a set is one of its elements, and no notation for something else.
        if self.inside:
            return False, "a set against something else in a structure"
        # (1,3) for \{1,3\} is careless notation, (3,1) is rather a point: only the
        # gold's order passes. The reverse, \{1,3\} for a point, is refused below,
        # since a set has lost the order.
        if answer[0] == "tuple" and (answer[1], answer[2]) == ("(", ")") and gold[0] == "set":
            return self.in_order(answer[3], gold[1]), "a tuple for a set, in the gold's order"
        # \{5\} is the solution set of 5. `same` trusts its second argument: the order stays.
        sides = [side[1][0] if side[0] == "set" and len(side[1]) == 1 else side
                 for side in (answer, gold)]
        if sides != [answer, gold] and not (is_structure(answer) and is_structure(gold)):
            return self.equal(*sides), "a set of one element"
        return False, "a set against something else"

    def tuples(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Tuples, points and intervals: the same brackets, the same elements in order."""
        if answer[0] != gold[0] or len(answer[3]) != len(gold[3]):
            return False, "a tuple or interval against something else, or a longer one"
        plain = all(side[1:3] in (("(", ")"), ("[", "]")) for side in (answer, gold))
        # With three elements or more no interval is meant, and [1,2,3] is (1,2,3).
        if answer[1:3] != gold[1:3] and not (plain and len(gold[3]) > 2):
            return False, "different brackets"
        return self.in_order(answer[3], gold[3]), "elements in order"

    def matrices(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """The same shape and equal entries; a row is not a column."""
        #   bmatrix and pmatrix give the same tree: brackets of a matrix carry no meaning
        if answer[0] != gold[0] or len(answer[1]) != len(gold[1]) or (
                len(answer[1][0]) != len(gold[1][0])):
            return False, "a matrix against something else, or of another shape"
        # The parser has checked that rows have one length, so a first row speaks for all.
        self.exact = True
        equal = all(map(self.in_order, answer[1], gold[1]))
        self.exact = False
        return equal, "matrix entries"

    def with_words(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """A number with words after it that are no unit: 15 wizards."""
        return answer[0] == gold[0] and answer[2] == gold[2] and (
            self.equal(answer[1], gold[1])), "a number with the same words after it"

    def ratios(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """3:4 is 6:8 and 3/4; what a clock could show is a time, which the parser knows."""
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
            return same_region(answer, gold, self.work), "the same set of real numbers"
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
        """Equations and inequalities; labelled values have gone through `assignments`."""
        # 5+6 = 11 without a name is 11 as well, if it is true; as gold it asks for the chain.
        if answer[0] == "rel" and set(answer[1]) <= {"=", "~"} and not any(
                map(letters_of, answer[2])) and (gold[0] != "rel" or letters_of(gold)) and (
                self.true_chain(answer[2])):
            equal, rule = self.same(answer[2][-1], gold)
            return equal, f"the last member of a chain; {rule}"
        if answer[0] == gold[0] == "rel":
            return self.two_relations(answer, gold)
        # x<5 is no 5; only the interval that solves a gold inequality may stand against it.
        return self.regions(answer, gold)

    def two_relations(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """A relation against a relation; chains are compared link by link, in any order."""
        if any(op not in ("=", "~") for op in gold[1]):
            # A letter's inequalities are sets of reals, where they are solved.
            try:
                return self.regions(answer, gold)
            except CannotDecide:
                pass
        # Past this point sides are subtracted, which is only possible with numbers.
        if any(is_structure(side) for side in answer[2] + gold[2]):
            return False, "relations between structures that differ"
        answers, golds = _links(answer), _links(gold)
        solved = self.assigned(gold, True)
        if solved and not letters_of(solved[1]) and len(answers) == 1 and answers[0][0] == "=":
            # The gold is solved: 2x = 10 only restates the question, x - 5 = 0 is let pass.
            # The difference has no factor but the sign here: 0 = x-4 passes for x = 4,
            # 2x-8 = 0 does not. Factors would let any equation with the right root pass,
            # the question's own among them.
            opposite = ("neg", answers[0][1])
            return (self.equal(answers[0][1], golds[0][1]) or self.equal(opposite, golds[0][1]),
                    "an equation that is solved, up to its sign")
        # 1 < x <= 4 and 4 >= x > 1 have the same two links, met in another order.
        return self.matched(answers, golds, self.link), (
            "equations up to a factor, inequalities as they stand")

    def link(self, answer: tuple, gold: tuple) -> bool:
        """(op, left - right) of both sides: the same for < and <=, proportional for = and !=."""
        (op, answer), (gold_op, gold) = answer, gold
        if op != gold_op:
            return False
        # A factor of an inequality is refused (2x>6 for x>3), since division by it is the question.
        if op in ("<", "<="):
            return self.equal(answer, gold)
        # Proportional means: l(p) r(b) = r(p) l(b) at every point p, with one fixed base
        # point b where both are nonzero. Without such a point an identity (x = x) would
        # be proportional to everything.
        zero = ("num", 0, None)
        for point in points_for(answer, gold, self.work)[0]:
            try:
                if equal_at(point, answer, zero, self.work)[0] or (
                        equal_at(point, gold, zero, self.work)[0]):
                    continue
            except CannotDecide:
                continue  # a point where one side has no value, such as x = 0 of 1/x
            return bool(letters_of(answer) and letters_of(gold)) and self.equal(
                ("mul", (answer, _placed(gold, point))), ("mul", (gold, _placed(answer, point))))
        return False

    # -- numbers and expressions --------------------------------------------------------------
    def scalars(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Percentages, units and choice letters aside, two expressions are equal as functions."""
        # Before evaluation, as letters: choice B and b are two different variables otherwise.
        if answer[0] == gold[0] in ("sym", "const") and not self.inside and (
                _is_choice(answer, gold)):
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
        # A share is no length: 5% is not 5 cm. Fifty percent of something has lost its sign.
        if (answer_pct or answer_unit) and (gold_pct or gold_unit) and (
                bool(answer_pct) != bool(gold_pct)):
            return False, "a percentage against a unit"
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
        if letters_of(answer) or letters_of(gold):
            return self.at_points(answer, gold)
        # No letters: one evaluation settles it, whereas functions need several points.
        equal, exact = equal_at({}, answer, gold, self.work)
        if not equal and not self.exact and rounds_to(answer, gold, self.work):
            return True, "a decimal that agrees to six places"
        return equal, "exact rational arithmetic" if exact else "values to many digits"

    def at_points(self, answer: tuple, gold: tuple) -> tuple[bool, str]:
        """Two expressions in letters: equal at every point where the gold has a value."""
        agreed, reason = 0, None
        points, whole = points_for(answer, gold, self.work)
        # Analytic expressions that agree at four random points of four-digit fractions
        # are identical, but for an accident that nobody can aim at; agreement at 1, 2 and
        # 3 would be easy to construct.
        for point in points:
            try:
                if not equal_at(point, answer, gold, self.work)[0]:
                    # One point is a proof of inequality, so most wrong answers
                    # cost a single evaluation.
                    return False, "expressions that differ at a point"
            except CannotDecide as error:
                # Out of work is final. So is an answer without a value where the gold has one: it
                # is another function. Only counting has its edges: n!/(n-3)! has no value at 1.
                if self.work.left < 0 or isinstance(error, NoValue) and not whole:
                    raise
                reason = error  # not defined at this point
                continue
            agreed += 1
        # An answer without a value nearly everywhere, 1/(x-x) say, must not win by default.
        if agreed < 3:
            raise CannotDecide(f"too few points where both sides have a value: {reason}")
        return True, f"expressions that agree at {agreed} points"


# The rule of a kind holds if it is on either side; in the order of binding, loosest first: a list
# may hold relations, a relation may hold sets, a set may hold numbers.
_RULES = {"list": Comparison.lists, "or": Comparison.lists, "rel": Comparison.relations,
          "setop": Comparison.unions, "domain": Comparison.unions, "set": Comparison.sets,
          "tuple": Comparison.tuples, "matrix": Comparison.matrices, "said": Comparison.with_words,
          "ratio": Comparison.ratios}


def _items(node: tuple) -> tuple:
    """The elements of a list, set or tuple; anything else is a list of itself."""
    if node[0] in ("list", "or", "set"):
        return node[1]
    return node[3] if node[0] == "tuple" else (node,)


def without_domain(answer: tuple, gold: tuple) -> tuple[tuple, tuple]:
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


def is_label(node: tuple) -> bool:
    r"""Can this be what an answer names its value with: x, f(2), |PQ|, (m, n), a:b, \sin A?

    What holds a number or a sum, such as 2x, x^2 or x+y, is an equation's side and no label:
    to restate the question's equation 2x = 8 is no answer 8.
    """
    kind = node[0]
    if kind in ("sym", "text"):
        return True
    if kind in ("call", "fn"):
        return all(arg[0] in ("sym", "num", "rel") for arg in node[2])
    if kind == "tuple":
        return node[1:3] == ("(", ")") and all(part[0] == "sym" for part in node[3])
    # |PQ| and |z| are lengths that a question asks for; |x| = 3 is an equation to be solved.
    if kind == "abs" and node[1][0] == "sym":
        return node[1][1][0] in "zw" or " " in node[1][1] or node[1][1][0].isupper()
    if kind in ("abs", "inv"):
        return is_label(node[1])
    if kind == "ratio":
        return all(map(is_label, node[1]))
    if kind != "mul":
        return False
    # XY/YZ is a ratio of segments; PQ is a segment, m\angle A a measure; xy is a product.
    if any(part[0] == "inv" for part in node[1]):
        return all(map(is_label, node[1]))
    return all(part[0] == "sym" and (part[1][0].isupper() or " " in part[1] or part[1] == "m")
               for part in node[1])


def _rows(rows: list, order: tuple) -> tuple:
    """Each solution as one value, or as the tuple of its values in a given order of the names."""
    values = [tuple(row[name] for name in order) for row in rows]
    return tuple(row[0] if len(row) == 1 else ("tuple", "(", ")", row) for row in values)


def _placed(node, point: dict):
    """The tree with numbers in the place of its letters."""
    if not isinstance(node, tuple):
        return node
    if node[:1] == ("sym",) and node[1] in point:
        return ("num", point[node[1]], None)
    return tuple([_placed(part, point) for part in node])


def _subjects(node: tuple) -> set:
    """What inequalities and memberships are about, x or f(x); nothing for an interval."""
    if node[0] == "or":
        return set().union(*map(_subjects, node[1]))
    if node[0] != "rel":
        return set()
    return {node[2][0]} if node[1] == ("in",) else {name for name, *_ in _solved(node)}


def _links(node: tuple) -> list:
    """A relation as (op, left - right) pairs, turned so that op is one of < <= = != in."""
    links = []
    for op, left, right in zip(node[1], node[2], node[2][1:]):
        if op in (">", ">="):
            #   x > 3  ->  ("<", 3 - x)        3 < x  ->  ("<", 3 - x)
            op, left, right = {">": "<", ">=": "<="}[op], right, left
        links.append(("=" if op == "~" else op, ("add", (left, ("neg", right)))))
    return links


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
    # Angles add up and have multiples: 180° - 50° is 130°, 2 \cdot 45° is 90°; 90° + 1 is nothing.
    if node[0] in ("add", "mul") and kind == "unit":
        parts = [_peel(part, kind) for part in node[1]]
        units = [unit for _, unit in parts if unit]
        if units and len(set(units)) == 1 and len(units) == (
                len(parts) if node[0] == "add" else 1):
            return (node[0], tuple(part for part, _ in parts)), units[0]
    if node[0] != kind:
        return node, ""
    return node[1], node[2] if kind == "unit" else "%"


def _infinity(node: tuple) -> int:
    """+1 or -1 for the two infinities, 0 for everything else."""
    if node == ("const", "inf"):
        return 1
    return -_infinity(node[1]) if node[0] == "neg" else 0


# ---------------------------------------------------------------------------------------------
# Sets of real numbers. The ends that occur cut the line into places: n ends are n points with n + 1
# gaps before, between and after them. Two sets are equal if they hold the same of these places.
#   [0,2] and [0,1] \cup (1,2]: ends 0, 1, 2; places  gap 0 gap 1 gap 2 gap

_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_COMPARE = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
            "=": operator.eq, "!=": operator.ne}


def same_region(answer: tuple, gold: tuple, work: Work) -> bool:
    """Are two unions, intervals, finite sets or solved inequalities the same set of reals?"""
    (ends, in_answer), (gold_ends, in_gold) = _region(answer), _region(gold)
    ends = {*ends, *gold_ends}
    values, context = _values([end for end in ends if not _infinity(end)], work)

    def order(one, other) -> int:
        work.spend(2)
        one, other = values[one], values[other]
        if not isinstance(one, Ball):
            return (one > other) - (one < other)
        with decimal.localcontext(context):
            return 0 if agree(one, other) else 1 if one.re > other.re else -1

    # The points have odd numbers, the gaps even ones; equal ends share their number.
    places, last = {}, None
    for end in sorted(values, key=cmp_to_key(order)):
        places[end] = 1 if last is None else places[last] + 2 * (order(last, end) != 0)
        last = end
    gap = max(places.values(), default=-1) + 1
    places.update((end, gap + 1 if _infinity(end) > 0 else -1) for end in ends if _infinity(end))
    work.spend((gap + 1) * len(ends) // 5)
    return all(in_answer(place, places) == in_gold(place, places) for place in range(gap + 1))


def _values(ends: list, work: Work) -> tuple[dict, decimal.Context]:
    """The ends' values, all exact or all balls, with digits enough for what is written in them."""
    precision = FIRST_PRECISION
    while precision <= MAX_PRECISION:
        evaluator = Evaluator({}, precision, work)
        # An end with a letter has no place on the line: (a, b) is then compared part by part.
        if any(is_structure(end) or letters_of(end) for end in ends):
            raise CannotDecide("an interval whose ends are not numbers")
        values = {end: evaluator.value(end) for end in ends}
        with decimal.localcontext(evaluator.context):
            if any(isinstance(value, Ball) for value in values.values()):
                values = {end: evaluator.ball(value) for end, value in values.items()}
                if not all(value.is_real() for value in values.values()):
                    raise CannotDecide("an interval whose ends are not real")
        if evaluator.need <= precision:
            return values, evaluator.context
        precision = evaluator.need + 20
    raise CannotDecide(f"more than {MAX_PRECISION} digits would be needed")


def _region(node: tuple) -> tuple:
    """(the ends that occur in a set of reals, does it hold a place?); raises CannotDecide for what
    is no such set. The question is asked as holds(place, {end: its place})."""
    kind, own = node[0], node[-1]
    if node == ("domain", "R"):
        return (), lambda place, places: True
    if kind == "set":
        return own, lambda place, places: any(places[end] == place for end in own)
    if kind == "tuple" and len(own) == 2 and node[1] in "([" and node[2] in ")]":
        def between(place: int, places: dict) -> bool:
            low, high = (places[end] for end in own)
            if low > high:
                raise CannotDecide("an interval whose ends are in the wrong order")
            return low < place < high or place == low and node[1] == "[" or (
                place == high and node[2] == "]")
        return own, between
    # "x>1, x<3" may mean both or either: a comma does not say, "or" does.
    if kind in ("setop", "or"):
        parts = [_region(part) for part in (node[2:] if kind == "setop" else node[1])]

        def joined(place: int, places: dict) -> bool:
            held = [holds(place, places) for _, holds in parts]
            return {"cap": all(held), "setminus": held[0] and not held[-1]}.get(node[1], any(held))
        return sum((tuple(ends) for ends, _ in parts), ()), joined
    if kind != "rel":
        raise CannotDecide("not a set of real numbers")
    if node[1] == ("in",):
        return _region(node[2][1])
    #   1 < x <= 4: both links hold       |x| > c: x > c or x < -c       |x| < c: x < c and x > -c
    links = [(any if size and op in (">", ">=", "=") else all,
              [(op, end), (_TURNED[op], ("neg", end))][:1 + size])
             for _, op, end, size in _solved(node)]
    return tuple(end for _, pair in links for _, end in pair), lambda place, places: all(
        join(_COMPARE[op](place, places[end]) for op, end in pair) for join, pair in links)


def _solved(node: tuple) -> list:
    """The links of a solved inequality, x < c or |x| < c, as (x, op, c, is it |x|?)."""
    links = []
    for op, left, right in zip(node[1], node[2], node[2][1:]):
        #   3 < x becomes x > 3, so that the letter is on the left
        if letters_of(right):
            left, right, op = right, left, _TURNED.get(op)
        name = left[1] if left[0] == "abs" else left
        # One letter, alone on its side: 2x < 6 as gold is not solved, and solving is not done here.
        if name[0] not in ("sym", "call") or letters_of(right) or op not in _TURNED:
            raise CannotDecide("an inequality that is not solved")
        links.append((name, op, right, left[0] == "abs"))
    return links
