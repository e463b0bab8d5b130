"""Problem files: what a row may look like, and one clear line for what it must not."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from nanolaser.problems import Problem, ProblemStream, load_problems, train_and_test


def rows_of(tmp_path, *rows, name="rows.jsonl", **options):
    """load_problems of a file with these rows (dicts, or raw lines of bytes)."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path = tmp_path / name
    path.write_bytes(b"\n".join(lines) + b"\n")
    return load_problems(str(path), **options)


def row(**changes):
    return {"problem": "1+1?", "answer": "2", **changes}


@pytest.mark.parametrize("raw, problem, answer", [
    ({"problem": "p", "answer": "a"}, "p", "a"),
    ({"question": "q", "final_answer": "a"}, "q", "a"),
    ({"problem": "p", "question": "q", "answer": None, "final_answer": "b"}, "p", "b"),
    ({"problem": " p\n", "answer": " a "}, "p", "a"),
    # GSM8K: the solution, then the answer
    ({"question": "q", "answer": "3*4=<<3*4=12>>12\n#### 12"}, "q", "12"),
    ({"question": "q", "answer": "a #### b\n#### 1,080"}, "q", "1,080"),
    # numbers stay as they are written
    (b'{"problem": "p", "answer": 70}', "p", "70"),
    (b'{"problem": "p", "answer": 0.10}', "p", "0.10"),
    (b'{"problem": "p", "answer": -1e3}', "p", "-1e3"),
    (b'{"problem": "p", "answer": ' + b"7" * 5000 + b"}", "p", "7" * 5000),
    # several answers
    ({"problem": "p", "answer": ["1", 2]}, "p", "1, 2"),
    # a BOM, CRLF, and a line separator that only str.splitlines takes for a line's end
    (b'\xef\xbb\xbf{"problem": "p", "answer": "2"}\r', "p", "2"),
    ('{"problem": "p\u2028q", "answer": "2"}'.encode(), "p\u2028q", "2"),
])  # fmt: skip
def test_rows_that_are_understood(tmp_path, raw, problem, answer):
    (read,) = rows_of(tmp_path, raw)
    assert (read.problem, read.answer) == (problem, answer)


def test_optional_fields_and_ids(tmp_path):
    full = row(id=7, level=3, subject="Algebra", solution="two")
    first, second = rows_of(tmp_path, full, b"", row(difficulty="5.5", topic="T"))
    assert (first.id, first.level, first.subject, first.solution) == ("7", "3", "Algebra", "two")
    # without an id: file and line, the empty line counted
    assert (second.id, second.level, second.subject) == ("rows-3", "5.5", "T")
    assert second.solution is None


@pytest.mark.parametrize("bad, message", [
    (b"{", "not JSON"),
    (b'{"problem": "p", "answer": NaN}', "NaN"),
    (b"[1, 2]", "not a JSON object"),
    (b'"text"', "not a JSON object"),
    (b"[" * 100_000, "nested too deeply|not JSON"),
    (b'{"problem": "\xff", "answer": "2"}', "not UTF-8"),
    (b'{"problem": "a\x00b", "answer": "2"}', "not JSON"),  # a raw NUL, unlike \u0000
    ({"answer": "2"}, "no problem or question"),
    ({"problem": "p", "solution": "s"}, "no answer or final_answer .it has: problem, solution"),
    (row(problem=""), "no problem or question"),
    (row(problem="  "), "no problem or question"),
    (row(answer=""), "no answer"),
    (row(answer=None), "no answer"),
    (row(answer=True), "answer is neither text nor a number: True"),
    (row(answer={"x": 1}), "answer is neither text nor a number"),
    (row(answer="so it is\n####"), "nothing follows ####"),
])  # fmt: skip
def test_rows_that_are_refused_with_file_and_line(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message) as error:
        rows_of(tmp_path, row(), bad)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:2")


def test_nul_and_half_characters_are_replaced_and_said(tmp_path, capsys):
    raw = b'{"problem": "a\\u0000b\\ud83d", "answer": "\\ud83d\\ude00"}'
    (read,) = rows_of(tmp_path, raw)
    # a pair of surrogates is one character, half of a pair is none
    assert (read.problem, read.answer) == ("a\ufffdb\ufffd", "\U0001f600")
    read.problem.encode()  # would raise on a lone surrogate
    assert "1 texts held NUL or half characters" in capsys.readouterr().err


def test_duplicate_ids_become_unique_and_are_said(tmp_path, capsys):
    problems = rows_of(tmp_path, *(row(id=i) for i in ("a", "a", "a#2", "a", 1, "1")))
    assert [p.id for p in problems] == ["a", "a#2", "a#2#2", "a#3", "1", "1#2"]
    assert "4 problems have an id that occurred before" in capsys.readouterr().err


def test_a_row_of_a_megabyte(tmp_path):
    (read,) = rows_of(tmp_path, row(problem="x" * 1_000_000))
    assert len(read.problem) == 1_000_000


def test_the_first_ones_and_no_more(tmp_path):
    problems = rows_of(tmp_path, row(id="a"), row(id="b"), b"never read", max_problems=2)
    assert [p.id for p in problems] == ["a", "b"]
    with pytest.raises(ValueError, match="at least 1"):
        rows_of(tmp_path, row(), max_problems=0)


def test_gold_answers_that_the_checker_cannot_read_are_counted(tmp_path, capsys):
    rows_of(tmp_path, row(), row(id="odd", answer="it depends"), parses=lambda gold: gold == "2")
    err = capsys.readouterr().err
    assert "1 of 2 gold answers cannot be read by the checker (first: odd: 'it depends')" in err
    rows_of(tmp_path, row(), parses=lambda gold: True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name, error, message", [
    ("gsm8", ValueError, "did you mean gsm8k"),
    ("math-500", ValueError, "did you mean math500"),
    ("arithmetik", ValueError, "did you mean arithmetic"),
    ("zzz", ValueError, "known: arithmetic, arithmetic-hard, subset-sum"),
    ("nope.jsonl", FileNotFoundError, "no such data file: nope.jsonl"),
    ("no/where", FileNotFoundError, "no such data file"),
])  # fmt: skip
def test_names_that_are_nothing(name, error, message):
    with pytest.raises(error, match=message):
        load_problems(name)


def test_files_without_problems(tmp_path):
    with pytest.raises(ValueError, match="not one problem"):
        rows_of(tmp_path, b"")
    rows_of(tmp_path, row())
    with pytest.raises(ValueError, match=r"is a folder; name a file in it \(rows.jsonl\)"):
        load_problems(str(tmp_path))


def test_a_split_that_a_benchmark_lacks(monkeypatch):
    with pytest.raises(ValueError, match="gsm8k has no split 'dev', only train, test"):
        load_problems("gsm8k", split="dev")


# ---------------------------------------------------------------------------------------------
# multiple choice


def choice(n: int) -> dict:
    wrong = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    return {"Question": f"Question {n}?", "Correct Answer": "right", **wrong, "Record ID": f"r{n}"}


def test_multiple_choice_is_a_letter(tmp_path):
    (read,) = rows_of(tmp_path, choice(0))
    lines = read.problem.splitlines()
    assert lines[0] == "Question 0?" and read.id == "r0"
    assert sorted(line[3:] for line in lines[2:6]) == ["right", "wrong 1", "wrong 2", "wrong 3"]
    assert [line[:3] for line in lines[2:6]] == ["A) ", "B) ", "C) ", "D) "]
    assert f"{read.answer}) right" in lines
    assert lines[-1] == "Which choice is right?  Give its letter."


def test_choices_are_shuffled_by_seed_and_not_by_place(tmp_path):
    many = rows_of(tmp_path, *(choice(n) for n in range(40)))
    again = rows_of(tmp_path, *(choice(n) for n in reversed(range(40))))
    assert {p.id: p for p in many} == {p.id: p for p in again}
    # every letter occurs; that one does not in 40 has probability 4 * (3/4)^40 = 4e-5, once
    assert {p.answer for p in many} == set("ABCD")
    other = rows_of(tmp_path, *(choice(n) for n in range(40)), seed=1)
    assert [p.answer for p in other] != [p.answer for p in many]


def test_gpqa_as_it_comes_in_csv(tmp_path):
    text = (
        'Record ID,Question,Correct Answer,'
        'Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n'
        'r1,"Two\nlines, and ""quotes""?",42,1,2,3\n'
    )
    (tmp_path / "gpqa.csv").write_text(text)
    (read,) = load_problems(str(tmp_path / "gpqa.csv"))
    assert read.problem.startswith('Two\nlines, and "quotes"?\n') and read.answer in "ABCD"
    (tmp_path / "bad.csv").write_text("problem,answer\n,3\n")
    with pytest.raises(ValueError, match=r"bad.csv:2: the row has no problem"):
        load_problems(str(tmp_path / "bad.csv"))


def pro(**changes) -> dict:
    """A row as MMLU-Pro has it."""
    return {"question_id": 70, "question": "Which?", "options": ["one", "two", "both A and B"],
            "answer": "C", "answer_index": 2, "category": "math", "src": "x", **changes}


def test_options_keep_their_order_and_the_answer_is_a_letter(tmp_path):
    (read,) = rows_of(tmp_path, pro())
    assert read.problem.splitlines()[:5] == ["Which?", "", "A) one", "B) two", "C) both A and B"]
    assert (read.answer, read.id, read.subject) == ("C", "70", "math")
    (read,) = rows_of(tmp_path, pro(options=None, answer="free"))  # no choice after all
    assert (read.problem, read.answer) == ("Which?", "free")


@pytest.mark.parametrize("changes", [{"answer": "D"}, {"answer": "two"}, {"options": "one, two"}])
def test_options_without_their_answer_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="rows.jsonl:1: the answer .* not the letter"):
        rows_of(tmp_path, pro(**changes))


def test_general_reasoning_by_alias(hub, tmp_path):
    """MMLU-Pro and WebInstruct-verified with the fields they have on the hub."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def table(rows) -> bytes:
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
        return (tmp_path / "x.parquet").read_bytes()

    hub.repositories["datasets/TIGER-Lab/MMLU-Pro"] = {
        "data/test-00000-of-00001.parquet": table([pro(), pro(question_id=71, answer="A")]),
        "data/validation-00000-of-00001.parquet": table([pro(question_id=1)]),
    }
    web = {"id": 9, "question": "How far?", "answer": "24 km", "answer_type": "Float",
           "category": "Physics", "difficulty": "University"}  # fmt: skip
    hub.repositories["datasets/TIGER-Lab/WebInstruct-verified"] = {
        "data/train-00000-of-00001.parquet": table([web]),
        "data/test-00000-of-00001.parquet": table([{**web, "id": 10, "question": "How long?"}]),
    }
    assert [(p.id, p.answer) for p in load_problems("MMLU-Pro")] == [("70", "C"), ("71", "A")]
    train, test = train_and_test("webinstruct-verified", "webinstruct-verified", 400)
    assert [(p.id, p.problem, p.answer) for p in train] == [("9", "How far?", "24 km")]
    assert [(p.id, p.level, p.subject) for p in test] == [("10", "University", "Physics")]


# ---------------------------------------------------------------------------------------------
# other formats, other places


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    columns = {"question": ["q", "r"], "answer": [0.5, None], "final_answer": ["x", "#### 3"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    problems = load_problems(str(tmp_path / "rows.parquet"))
    assert [(p.id, p.answer) for p in problems] == [("rows-1", "0.5"), ("rows-2", "3")]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match="bad.parquet: not a readable Parquet file") as error:
        load_problems(str(tmp_path / "bad.parquet"))
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install pyarrow"):
        load_problems(str(tmp_path / "rows.parquet"))


def test_arithmetic_by_name():
    problems = load_problems("arithmetic", max_problems=5, seed=3)
    assert len(problems) == 5 and all(p.problem.endswith("=?") for p in problems)
    assert problems == load_problems("arithmetic", max_problems=5, seed=3)


# ---------------------------------------------------------------------------------------------
# training and evaluation


def file_of(tmp_path, numbers, name="rows.jsonl") -> str:
    """The path of a file with one problem for each of the numbers."""
    rows_of(tmp_path, *(row(problem=f"{i}+1?") for i in numbers), name=name)
    return str(tmp_path / name)


def texts(problems) -> set[str]:
    return {p.problem for p in problems}


@pytest.mark.parametrize("rows, most, evaluated", [
    (1000, 400, 200),  # a fifth
    (1000, 30, 30),  # every 34th
    (1000, 70, 67),  # every 15th
    (30, 400, 6),
    (30, None, 6),  # all that may be held out
    (2, 400, 1),
])  # fmt: skip
def test_a_part_of_a_file_is_held_out(tmp_path, rows, most, evaluated):
    file = file_of(tmp_path, range(rows))
    train, test = train_and_test(file, file, most)
    assert len(test) == evaluated and len(train) == rows - evaluated
    assert not texts(train) & texts(test)
    assert train_and_test(file, file, most) == (train, test)


def test_what_is_evaluated_is_not_trained_on_whatever_the_file(tmp_path):
    # a problem that is held out once is in no other place either
    twice = file_of(tmp_path, [*range(12), *range(12)])
    train, test = train_and_test(twice, twice, 400)
    assert texts(train) | texts(test) == {f"{i}+1?" for i in range(12)}
    assert not texts(train) & texts(test)
    # and one that two files share is only in the evaluation
    other = file_of(tmp_path, range(8, 20), "other.jsonl")
    train, test = train_and_test(twice, other, 3)
    assert texts(test) == {"8+1?", "9+1?", "10+1?"}
    assert texts(train) == {f"{i}+1?" for i in (*range(8), 11)}
    with pytest.raises(ValueError, match="nothing to train on is left"):
        train_and_test(other, file_of(tmp_path, range(8, 20), "copy.jsonl"), 400)


def test_arithmetic_is_made_up_while_training():
    train, test = train_and_test("arithmetic", "arithmetic", 5)
    assert train == [] and len(test) == 5


@pytest.mark.parametrize("name, count", [
    ("math500/test", 500), ("aime24/test", 30), ("aime25/test", 30), ("amc23/test", 40),
    ("OlympiadBench/test", 675), ("gsm8k/test", 1319), ("gsm8k/train", 7473),
])  # fmt: skip
def test_real_benchmark_files(shared, name, count, capsys):
    problems = load_problems(str(shared / f"{name}.jsonl"))
    assert len(problems) == len({p.id for p in problems}) == count
    assert all(p.problem and p.answer and "####" not in p.answer for p in problems)
    assert capsys.readouterr().err == ""


def test_reading_problems_does_not_import_torch():
    code = (
        "import sys, nanolaser.problems as p\n"
        "p.load_problems('arithmetic')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------
# the problems of each step


def numbered(count: int) -> list[Problem]:
    return [Problem(id=str(i), problem=f"{i}+1?", answer=str(i + 1)) for i in range(count)]


def ids(stream: ProblemStream, steps) -> list[str]:
    return [p.id for step in steps for p in stream.at(step)]


def test_every_epoch_has_every_problem_once_in_an_order_of_its_own():
    stream = ProblemStream(numbered(50), problems_per_step=7, seed=0)
    drawn = ids(stream, range(1, 51))  # 350 problems: 7 epochs, which end within steps
    epochs = [drawn[i : i + 50] for i in range(0, 350, 50)]
    assert all(sorted(e, key=int) == [str(i) for i in range(50)] for e in epochs)
    assert len({tuple(e) for e in epochs}) == 7


def test_the_epochs_of_two_seeds_are_unrelated():
    """Not shifted against each other: seed 1's epoch e was seed 0's epoch e + 1."""
    epoch = lambda seed, e: tuple(  # noqa: E731
        ids(ProblemStream(numbered(40), 40, seed), [1 + e])
    )
    assert len({epoch(seed, e) for seed in range(4) for e in range(4)}) == 16


@pytest.mark.parametrize("made_up", [None, "arithmetic", "subset-sum"])
def test_a_step_has_its_problems_whatever_was_asked_before(made_up):
    problems = [] if made_up else numbered(11)
    steps = [9, 1, 30, 2, 9, 29, 3]
    one = ProblemStream(problems, 4, 5, made_up)
    asked = [one.at(step) for step in steps]
    assert asked == [ProblemStream(problems, 4, 5, made_up).at(step) for step in steps]


def test_the_order_is_made_once_an_epoch():
    """A hundred thousand problems are shuffled once, not once for each problem of a step."""
    stream = ProblemStream(numbered(100_000), 128, 0)
    start = time.process_time()
    for step in range(1, 400):
        stream.at(step)
    # one shuffle is 0.1 s; 128 a step would be minutes
    assert time.process_time() - start < 5


@pytest.mark.parametrize("count", [1, 16, 300])
def test_c_ref_is_measured_on_as_many_problems_as_asked_for(count):
    arithmetic = ProblemStream([], 16, 3, "arithmetic").for_c_ref(count)
    assert len(texts(arithmetic)) == len(arithmetic) == count
    few = ProblemStream(numbered(20) + numbered(20), 16, 3).for_c_ref(count)
    assert len(texts(few)) == len(few) == min(count, 20)
    # the first problems of the first epoch, so that a file sorted by difficulty does no harm
    assert [p.id for p in few] != [str(i) for i in range(count)] or count == 1


def test_nothing_to_learn_from():
    with pytest.raises(ValueError, match="no problem"):
        ProblemStream([], 16, 0)
