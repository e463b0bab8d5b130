"""nanolaser's answer checker beside Math-Verify, the checker of the official LaSeR code.

    python benchmarks/checker.py --data BENCHMARKS [--max-pairs 2000]

One run, the same pairs, both checkers. The sets of pairs:
    solutions   every MATH-500 solution against its gold: find the box, compare (truth: equal)
    respelled   MATH-500 and OlympiadBench golds against themselves, written another way (equal)
    neighbours  pairs of different golds of both (truth: unequal, but for the reviewed pairs)
    table       the pairs of tests/data/checker_table.txt, each with its truth: our own table
    cases       somebody else's table, if checker_cases.jsonl lies in BENCHMARKS: a line each with
                answer, gold, equal (and category: "hostile..." is left out)
For each set: how often each checker agrees with the truth, how many wrong answers it takes for
right ones, the processor seconds that a thousand pairs take, and the ratio. In the first set most
answers are their gold's very text, which nanolaser sees at once; the others make it parse.
Every disagreement is printed with who is right. The last line is JSON.
Math-Verify is called as its documentation shows, parse then verify; hostile input, on which it
runs into its timeout of 5 s, is left out here (tests/test_checker.py has it).
"""

import argparse
import json
import logging
import random
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanolaser.checker import extract_answer, is_equivalent  # noqa: E402

RESPELLINGS = [("\\frac{", "\\dfrac{"), ("(", "\\left("), (")", "\\right)"), ("+", " + "),
               ("\\sqrt{", "\\sqrt {"), (",", ",\\ "), ("^\\circ", "^{\\circ}"), ("\\pi", "π"),
               ("-", "−")]
THOUSANDS = re.compile(r"\d,(?:\\!)?\s?\d{3}(?!\d)")


def read_rows(folder: Path, name: str) -> list[dict]:
    """The rows of one benchmark file; raises FileNotFoundError where it is missing."""
    lines = (folder / name / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def respelled(gold: str) -> str:
    """The same answer with other spacing, fraction commands and minus signs."""
    if "\\text" in gold or "where" in gold:
        return f" {gold} "
    for old, new in RESPELLINGS:
        if old in "()" and "\\left" in gold or old == "," and THOUSANDS.search(gold):
            continue  # \\left twice, or a comma that belongs to a number
        gold = gold.replace(old, new)
    return f"{gold} "


def pairs_of(folder: Path, limit: int, seed: int) -> dict[str, list[tuple]]:
    """{set: [(answer or solution, gold, truth)]}."""
    math500, olympiad = read_rows(folder, "math500"), read_rows(folder, "OlympiadBench")
    golds = sorted({str(row["answer"]) for row in math500 + olympiad})
    data = ROOT / "tests" / "data"
    reviewed = {tuple(line.split(" == ")) for line in
                (data / "equal_gold_pairs.txt").read_text(encoding="utf-8").splitlines()
                if " == " in line and not line.startswith("#")}
    rng = random.Random(seed)
    neighbours = [tuple(rng.sample(golds, 2)) for _ in range(limit)] + sorted(reviewed)
    table = []
    for line in (data / "checker_table.txt").read_text(encoding="utf-8").splitlines():
        sign = next((s for s in (" == ", " => ", " != ", " /= ") if s in line), None)
        if sign and not line.startswith("#"):
            answer, gold = line.split(sign)
            if "!)!" not in line and "^{10^{" not in line and "7^{7^" not in line:
                table.append((answer, gold, sign in (" == ", " => ")))
    sets = {"solutions": [(row["solution"], row["answer"], True) for row in math500],
            "respelled": [(respelled(gold), gold, True) for gold in golds],
            "neighbours": [(a, g, (a, g) in reviewed) for a, g in neighbours],
            "table": table}
    if (folder / "checker_cases.jsonl").exists():
        lines = (folder / "checker_cases.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines)
                if not row.get("category", "").startswith("hostile")]
        sets["cases"] = [(row["answer"], row["gold"], row["equal"]) for row in rows]
    return sets


def ours(answer: str, gold: str, from_text: bool) -> bool:
    """One pair by nanolaser, extraction included where the answer is a whole solution."""
    found = extract_answer(answer) if from_text else answer
    return found is not None and is_equivalent(found, gold)


def math_verify(answer: str, gold: str, from_text: bool) -> bool:
    """One pair by Math-Verify: parse both sides, then verify."""
    from math_verify import parse, verify
    parsed = parse(answer if from_text else f"${answer}$")
    return bool(verify(parse(f"${gold}$"), parsed))


def run(check, pairs: list[tuple], from_text: bool) -> tuple[list, list]:
    """(verdicts, seconds) of one checker on one set."""
    verdicts, seconds = [], []
    for answer, gold, _ in pairs:
        started = time.process_time()
        verdicts.append(check(answer, gold, from_text))
        seconds.append(time.process_time() - started)
    return verdicts, seconds


def figures(verdicts: list, seconds: list, pairs: list[tuple]) -> dict:
    """What one checker's verdicts on one set are worth, and what they took."""
    truths = [truth for _, _, truth in pairs]
    return {"right": sum(v == t for v, t in zip(verdicts, truths)),
            "false_right": sum(v and not t for v, t in zip(verdicts, truths)),
            "seconds_per_1000": 1000 * sum(seconds) / len(pairs), "max_ms": 1e3 * max(seconds),
            "median_us": 1e6 * statistics.median(seconds)}


def compare(name: str, pairs: list[tuple], peer: bool) -> dict:
    """Run both checkers on one set, print the disagreements, return the figures."""
    from_text = name == "solutions"
    mine, seconds = run(ours, pairs, from_text)
    result = {"pairs": len(pairs), "nanolaser": figures(mine, seconds, pairs)}
    if not peer:
        return result
    theirs, seconds = run(math_verify, pairs, from_text)
    result["math_verify"] = figures(theirs, seconds, pairs)
    for verdict, other, (answer, gold, truth) in zip(mine, theirs, pairs):
        if verdict != other:
            right = "nanolaser" if verdict == truth else "Math-Verify"
            shown = (extract_answer(answer) if from_text else answer) or ""
            print(f"  {name}: {shown[:50]!r} for {gold[:50]!r}: truth {truth}, right: {right}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True,
                        help="folder with math500/ and OlympiadBench/ (test.jsonl each)")
    parser.add_argument("--max-pairs", type=int, default=2000, help="random pairs of golds")
    parser.add_argument("--seed", type=int, default=0, help="of the random pairs")
    options = parser.parse_args()
    try:
        sets = pairs_of(options.data, options.max_pairs, options.seed)
    except FileNotFoundError as error:
        parser.exit(2, f"benchmarks/checker.py: {error}; give --data\n")
    logging.disable(logging.CRITICAL)  # Math-Verify logs each failure
    try:
        math_verify("1", "1", False)  # its first call builds its grammars: not timed
        peer = True
    except ImportError:
        peer = False
        print("Math-Verify is not installed (pip install 'math-verify[antlr4_13_2]'): ours only")
    results = {name: compare(name, pairs, peer) for name, pairs in sets.items()}
    print(f"\n{'set':<12}{'pairs':>6}  {'checker':<12}{'right':>7}{'wrong taken for right':>23}"
          f"{'s / 1000':>10}{'ratio':>7}")
    for name, result in results.items():
        for checker in [key for key in result if key != "pairs"]:
            r = result[checker]
            ratio = r["seconds_per_1000"] / result["nanolaser"]["seconds_per_1000"]
            print(f"{name:<12}{result['pairs']:6}  {checker:<12}{r['right'] / result['pairs']:7.1%}"
                  f"{r['false_right']:23}{r['seconds_per_1000']:10.3f}{ratio:7.0f}")
    print(json.dumps({"benchmark": "checker", "math_verify": peer, **results}))


if __name__ == "__main__":
    main()
