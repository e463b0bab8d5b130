"""
Subset sum, such as "50 from a7 b10 c14 d16 e17 f18": which of these numbers make 50?  The second
task of an embedded model, whose solutions are hard to find and easy to check.

It is the textbook example of such a task (NP-complete, Karp 1972): no way is known that is much
better than trying, and one subtraction after another tells whether a try was right:

    50-f18=32⏎32-e17=15⏎15-c14=1⏎\\boxed{f,e,c}               1 is left over: wrong
    50-d16=34⏎34-b10=24⏎24-e17=7⏎7-a7=0⏎\\boxed{d,b,e,a}      nothing is: right
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator

from nanolaser.tiny.arithmetic import is_held_out

# Each number has a letter, for the reader of characters that a tiny model is: whether 16 is one of
# the numbers it hardly learns to see, what is behind d it does.
LETTERS = "abcdef"
LARGEST = 20  # of the numbers
SIZES = (2, 3, 4)  # of the subset that is looked for


def subset_sum(rng: random.Random) -> tuple[int, dict[str, int], str]:
    """A random problem: (target, letter -> number, letters of the one subset that makes it)."""
    while True:
        values = sorted(rng.sample(range(1, LARGEST + 1), len(LETTERS)))
        numbers = dict(zip(LETTERS, values))
        target = sum(rng.sample(values, rng.choice(SIZES)))
        # All 63 subsets of six numbers are tried.  Three of five problems have another solution, or
        # one of a single number, and are thrown away: so a checker may compare with THE solution,
        # for a list has no order.
        sizes = range(1, len(LETTERS) + 1)
        tried = itertools.chain(*(itertools.combinations(LETTERS, size) for size in sizes))
        right = [subset for subset in tried if sum(map(numbers.get, subset)) == target]
        if len(right) == 1:
            return target, numbers, "".join(right[0])


def subset_text(target: int, numbers: dict[str, int]) -> str:
    """The problem as it is asked."""
    # 50, {"a": 7, "b": 10, ...}  ->  50 from a7 b10 ...
    return f"{target} from " + " ".join(f"{letter}{n}" for letter, n in numbers.items())


def made_up(seed: int, split: str) -> Iterator[tuple[str, str, int]]:
    """Endless (text, answer, size of the subset) of the split (train, test): the same seed gives
    the same ones."""
    rng = random.Random(f"{split} {seed}")
    while True:
        target, numbers, chosen = subset_sum(rng)
        text = subset_text(target, numbers)
        if is_held_out(text) == (split == "test"):
            yield text, ",".join(chosen), len(chosen)


def reward(problem: str, response: str, answer: str | None = None) -> float:
    """1.0 if the letters in the response's one box are different ones of the problem's and their
    numbers add up to its target, else 0.0; for `--reward nanolaser/tiny/subset_sum.py:reward`."""
    # The same verdict as the checker's, and no gold answer is needed for it: one adds up.
    target = int(re.search(r"\d+", problem).group())
    numbers = {letter: int(n) for letter, n in re.findall(r"([a-z])(\d+)", problem)}
    # Two boxes are no answer: whoever may name several solutions need not find one.
    boxes = re.findall(r"\\boxed\{([a-z](?:,[a-z])*)\}", response)
    if len(boxes) != 1 or response.count("\\boxed{") != 1:
        return 0.0
    chosen = boxes[0].split(",")
    # Each letter once, and only those of the problem: 50 from a7 ... is not seven times a7 and 1.
    once = len(set(chosen)) == len(chosen) and set(chosen) <= set(numbers)
    return float(once and sum(map(numbers.get, chosen)) == target)


def attempt(target: int, numbers: dict[str, int], rng: random.Random, slip: float) -> str:
    """One try, as a person makes it who picks what fits and looks whether the rest is there."""
    unused, chosen, steps, left = dict(numbers), [], "", target
    while left > 0 and len(chosen) < SIZES[-1]:
        # 1. Any number that fits; and if what is left is one of them, most often that one.
        fits = [letter for letter, number in unused.items() if number <= left]
        if not fits:
            break
        last = [letter for letter in fits if unused[letter] == left]
        letter = last[0] if last and rng.random() < 0.9 else rng.choice(fits)
        number, rest = unused[letter], left - unused[letter]
        # 2. Now and then an error, so that there is something to be checked: a difference that is
        #    off, a number that is not the letter's but would be welcome, one that has been used.
        if rng.random() < slip:
            ways = [(letter, number, max(0, rest + rng.choice((-10, -1, 1, 10))))]
            ways += [(letter, left, 0)] if left <= LARGEST else []
            ways += [(x, numbers[x], left - numbers[x]) for x in chosen[:1] if numbers[x] <= left]
            letter, number, rest = rng.choice(ways)
        steps += f"{left}-{letter}{number}={rest}\n"
        unused.pop(letter, None)
        chosen.append(letter)
        left = rest
    return f"{steps}\\boxed{{{','.join(chosen)}}}"
