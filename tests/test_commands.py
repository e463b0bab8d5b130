"""sample.py, verify.py, and what is wrong with any script's command line, as a user runs them, on
the embedded model.

What a user pipes, kills or starts side by side runs in processes of its own; everything else runs
a script in this process (`call`), which saves two seconds of imports each.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanolaser.checkpoint import save_pretrained

ROOT = Path(__file__).parents[1]
PROBLEM = "(14+25)*2-9=?"
# The base model has no c_ref (training estimates it); any number near its log pi(z_c) will do.
# The embedded model says -31.3 +- 0.2 nats, before any self-rewarding.
C_REF = ["--c-ref", "-36"]  # r_s near 0.5
BELIEVE = ["--c-ref", "-41"]  # r_s near 1
ENVIRONMENT = {**os.environ, "CI": "true", "OMP_NUM_THREADS": "1"}
ROW_KEYS = {"problem", "gold", "response", "answer", "r_v", "r_s", "logp_zc", "finished",
            "response_tokens", "prompt_id"}  # fmt: skip


def start(script, *arguments, **more):
    """The script in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=ENVIRONMENT, **more)  # fmt: skip


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------------------------------------
# sample.py


def test_one_solution_is_printed_with_its_r_s(call):
    code, out, err = call("sample.py", PROBLEM, *C_REF, "--seed", 1)
    assert (code, err) == (0, "")
    assert "\\boxed{" in out and "r_s " in out and "answer " in out
    assert call("sample.py", PROBLEM, *C_REF, "--seed", 1)[1] == out  # the seed says it all
    assert call("sample.py", PROBLEM, *C_REF, "--seed", 2)[1] != out


def test_json_rows_and_vote(call):
    code, out, _ = call("sample.py", "--n", 6, "--vote", "--json", *C_REF, "--gold", 69, PROBLEM)
    *rows, last = rows_of(out)
    assert code == 0 and len(rows) == 6
    for row in rows:
        assert ROW_KEYS <= set(row)
        assert row["r_v"] == float(row["answer"] == "69")
        assert len(row["response_token_ids"]) == row["response_tokens"]
        assert row["r_s"] == pytest.approx(0.1 * (row["logp_zc"] + 36))
    vote = last["vote"]
    assert sum(c["votes"] for c in vote["candidates"]) == 6
    weight = sum(min(1, max(0, row["r_s"])) for row in rows)
    assert sum(c["weight"] for c in vote["candidates"]) == pytest.approx(weight)
    assert vote["majority"] in {row["answer"] for row in rows}


def test_vote_merges_what_is_equal_as_mathematics(capsys):
    import sample

    made = [("0.5", 0.4), ("2", 0.9), ("\\frac12", 0.6), ("2", -3.0), (None, 0.9), ("1/2", None)]
    rows = [{"answer": a, "r_s": r, "finished": r is not None} for a, r in made]
    decision = sample.decide(rows, 6, sample.Options())
    assert decision["candidates"] == [
        {"answer": "0.5", "votes": 3, "weight": 1.0},
        {"answer": "2", "votes": 2, "weight": 0.9},
        {"answer": None, "votes": 1, "weight": 0.9},
    ]
    assert decision["majority"] == decision["weighted"] == "0.5"
    sample.print_vote(rows, decision)
    out = capsys.readouterr().out
    assert "<- majority, weighted" in out and "52.6 % of the weight" in out and "how sure" in out


def test_vote_without_c_ref_is_the_majority(call):
    _, out, err = call("sample.py", "--n", 4, "--vote", "--model", "tiny", "2+3=?")
    assert "c_ref was never estimated" in err and "every solution weighs the same" in out


def test_adaptive_stops_early_with_the_same_solutions(call):
    _, plain, _ = call("sample.py", "--n", 24, "--json", *BELIEVE, "2+3=?")
    _, out, _ = call("sample.py", "--n", 24, "--adaptive", "--json", *BELIEVE, "2+3=?")
    *rows, last = rows_of(out)
    vote = last["vote"]
    # nearly every solution says 5 and is believed: that is settled long before 24
    assert len(rows) < 24 and vote["saved"] == 24 - len(rows) > 0
    assert vote["saved_change_probability"] <= 0.05
    drawn = [row["response_token_ids"] for row in rows]
    assert drawn == [row["response_token_ids"] for row in rows_of(plain)][: len(rows)]
    _, out, _ = call("sample.py", "--n", 24, "--adaptive", *BELIEVE, "2+3=?")
    assert f"{vote['saved']} saved" in out


def test_until_stops_at_the_first_solution_that_is_believed(call):
    how = ["--n", 6, "--json", *C_REF, PROBLEM]
    _, plain, _ = call("sample.py", *how)
    scores = [row["r_s"] for row in rows_of(plain)]
    # between the two highest of those that differ by more than rounding
    middle = sum(sorted({round(score, 2) for score in scores})[-2:]) / 2
    first = next(i for i, score in enumerate(scores) if score > middle)
    _, out, _ = call("sample.py", "--until", middle, *how)
    *rows, last = rows_of(out)
    assert [row["r_s"] for row in rows] == pytest.approx(scores[: first + 1], abs=1e-4)
    assert last["vote"]["believed"] == rows[-1]["answer"] and last["vote"]["saved"] == 5 - first
    _, out, _ = call("sample.py", "--until", max(scores) + 1, *how)
    *rows, last = rows_of(out)
    assert len(rows) == 6 and last["vote"]["believed"] is None and last["vote"]["saved"] == 0


def test_nothing_to_vote_on(call):
    code, out, _ = call("sample.py", "--vote", "--n", 3, "--max-new-tokens", 3, *C_REF, PROBLEM)
    assert code == 0 and "cut off, no r_s" in out and "nothing to vote on" in out
    assert "3 of 3 solutions cut off" in out


# ---------------------------------------------------------------------------------------------
# verify.py


def test_pipe_from_sample_to_verify_gives_the_samplers_number(tmp_path):
    sampled = start("sample.py", "--n", 4, "--json", *C_REF, "--gold", 69, PROBLEM)
    checked = start("verify.py", "--input", "-", "--output", "-", *C_REF, stdin=sampled.stdout)
    out, err = checked.communicate(timeout=600)
    assert checked.returncode == 0, err
    rows = rows_of(out)
    assert len(rows) == 4 and "4 solutions" in err and "4 with gold" in err
    # verify.py overwrites r_s: what the sampler said is drawn again
    again = start("sample.py", "--n", 4, "--json", *C_REF, PROBLEM).communicate(timeout=600)[0]
    for row, own in zip(rows, rows_of(again)):
        assert row["response_token_ids"] == own["response_token_ids"]
        assert row["logp_zc"] == pytest.approx(own["logp_zc"], abs=1e-4)
        assert row["verdict"] == ("right" if row["r_s"] > 0.5 else "wrong")
        assert row["tokens_from"] == "ids"


def test_verify_one_solution(call):
    one = ["verify.py", "--problem", "2+3=?", "--solution"]
    code, out, _ = call(*one, "2+3=5\n\\boxed{5}", "--gold", "5", *C_REF)
    assert code == 0 and "verdict " in out and "answer    5" in out and "checker   right" in out
    code, out, _ = call(*one, "no idea", "--gold", "-5", *C_REF)
    assert code == 0 and "no boxed answer" in out and "checker   wrong" in out
    code, out, err = call(*one, "\\boxed{5}")
    assert code == 0 and "log pi(<|reserved_0|>)" in out and "c_ref was never estimated" in err


def test_verify_file_reports_bad_rows_and_does_the_rest(call, tmp_path):
    good = {"question": "2+3=?", "response": "\\boxed{5}", "gold": 5, "mine": "kept"}
    lines = [json.dumps(good), "{", "[]", '{"problem": "x"}', "",
             json.dumps({**good, "finished": False}),
             json.dumps({**good, "response_token_ids": ["a"]}), "[" * 100_000]  # fmt: skip
    data = tmp_path / "in.jsonl"
    data.write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    code, _, err = call("verify.py", "--input", data, "--output", out, *C_REF)
    assert code == 1
    for said in ("line 2: not JSON", "line 3: not a JSON object", "line 4: no response",
                 "line 7: response_token_ids", "line 8: nested too deeply"):  # fmt: skip
        assert said in err
    done, cut = rows_of(out.read_text())
    assert (done["mine"], done["r_v"], done["answer"]) == ("kept", 1.0, "5")
    assert done["r_s"] is not None and done["checker"]
    assert cut["r_s"] is None and cut["verdict"] is None  # no end: nothing to read r_s at


def test_verify_scores_tokens_as_they_are(call, tmp_path):
    # The same text, cut off in one row: with ids it is their end that counts.
    from nanolaser.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(ROOT / "nanolaser" / "tiny")
    ids = tokenizer.encode("2+3=5\n\\boxed{5}")
    whole = {"problem": "2+3=?", "response": "2+3=5\n\\boxed{5}"}
    rows = [whole, {**whole, "response_token_ids": ids + [tokenizer.stop_ids[0]]},
            {**whole, "response_token_ids": ids}]  # fmt: skip
    data = write_rows(tmp_path / "in.jsonl", rows)
    call("verify.py", "--input", data, "--output", tmp_path / "out.jsonl", *C_REF)
    text, tokens, cut = rows_of((tmp_path / "out.jsonl").read_text())
    assert text["logp_zc"] == pytest.approx(tokens["logp_zc"], abs=1e-5)
    assert cut["r_s"] is None
    # Another tokenizer's ids, too large or of another text: the row's text is scored instead.
    write_rows(data, [{**whole, "response_token_ids": wrong} for wrong in ([10**6], ids[:3])])
    call("verify.py", "--input", data, "--output", tmp_path / "out.jsonl", *C_REF)
    for row in rows_of((tmp_path / "out.jsonl").read_text()):
        assert row["logp_zc"] == pytest.approx(text["logp_zc"], abs=1e-5)
        assert row["tokens_from"] == "text"
    write_rows(data, [{"problem": "2+3=?", "response_token_ids": [10**6]}])
    code, _, err = call("verify.py", "--input", data, "--output", tmp_path / "x.jsonl")
    assert code == 2 and "another model's" in err and not (tmp_path / "x.jsonl").exists()


@pytest.mark.skipif(os.name != "posix", reason="POSIX files")
def test_what_is_no_regular_file_is_written_to_and_links_are_followed(call, tmp_path):
    data = write_rows(tmp_path / "in.jsonl", [{"problem": "2+3=?", "response": "\\boxed{5}"}])
    (tmp_path / "target.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to("target.jsonl")
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    for name in ("link.jsonl", "pipe"):
        code, _, err = call("verify.py", "--input", data, "--output", tmp_path / name, *C_REF)
        assert code == 0, err
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "pipe").is_fifo()
    (row,) = rows_of((tmp_path / "target.jsonl").read_text())
    assert row["answer"] == "5" and rows_of(reader.communicate(timeout=20)[0]) == [row]


# ---------------------------------------------------------------------------------------------
# every script


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("line, code, said", [
    ("sample.py - <&-", 2, "standard input is closed"),
    ("verify.py --problem x --solution - <&-", 2, "standard input is closed"),
    ("verify.py --input - --output - <&-", 2, "standard input is closed"),
    ("sample.py --c-ref -36 '2+3=?' >&-", 0, ""),
    ("verify.py --c-ref -36 --problem x --solution y >&- 2>&-", 0, ""),
])  # fmt: skip
def test_closed_streams_and_warnings_as_errors(line, code, said):
    script, _, rest = line.partition(" ")
    command = f'"{sys.executable}" -W error "{ROOT / script}" {rest}'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == code and said in done.stderr
    assert done.stderr.count("\n") == (1 if said else 0), done.stderr


@pytest.mark.parametrize("script, arguments", [
    ("sample.py", [PROBLEM]), ("sample.py", [PROBLEM, "--json", "--n", 2]),
    ("verify.py", ["--problem", PROBLEM, "--solution", "x"]),
    ("evaluate.py", ["--max-problems", 1]),
])  # fmt: skip
def test_weights_of_nan_are_one_line_before_a_token_is_shown(
    tiny, call, tmp_path, monkeypatch, script, arguments
):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    save_pretrained(model, tokenizer, "nan")
    code, out, err = call(script, *arguments, "--model", "nan")
    assert (code, out, err.count("\n")) == (2, "", 1) and "NaN or infinity" in err
    assert os.listdir(tmp_path) == ["nan"]


@pytest.mark.parametrize("script", ["sample.py", "verify.py", "evaluate.py"])
def test_help(call, script):
    code, out, _ = call(script, "--help")
    options = runpy.run_path(str(ROOT / script))["Options"]
    positional = {"sample.py": "problem"}.get(script)
    for name in options.__dataclass_fields__:
        assert (name if name == positional else f"  --{name.replace('_', '-')}") in out
    assert code == 0 and max(map(len, out.splitlines())) <= 100


BAD = [
    ("sample.py", [], "no problem given"),
    ("sample.py", [" "], "the problem is empty"),
    ("sample.py", ["2", "+", "3"], "quote a text that has spaces"),
    ("sample.py", ["x", "--n", "0"], "--n: must be at least 1"),
    ("sample.py", ["x", "--votes"], "did you mean --vote"),
    ("sample.py", ["x", "--model", "qwen2.5-7"], "did you mean qwen2.5-7b"),
    ("sample.py", ["x", "--model", "HERE"], "no config.json"),
    ("sample.py", ["x", "--z-c", "ab"], "no token of this vocabulary"),
    ("sample.py", ["x", "--z-c", "\U0001f914"], "no token of this vocabulary"),
    ("sample.py", ["x", "--seed", str(2**64)], "--seed: must be at most"),
    ("sample.py", ["x", "--temperature", "1e300"], "--temperature: must be 0 or at most 100"),
    ("sample.py", ["x", "--temperature", "1e-300"], "--temperature: must be 0 or at least 0.01"),
    ("sample.py", ["x", "--kv-cache-gb", "1e300"], "--kv-cache-gb: must be at most"),
    ("sample.py", ["x", "--n", str(10**12)], "--n: must be at most"),
    ("evaluate.py", ["--max-problems", str(10**12)], "--max-problems: must be at most"),
    ("verify.py", [], "nothing to verify"),
    ("verify.py", ["--problem", "x"], "belong together"),
    ("verify.py", ["--problem", "x", "--input", "y"], "not both"),
    ("verify.py", ["--input", "HERE/good.jsonl", "--output", "HERE"], "is a folder"),
    ("verify.py", ["--input", "HERE/none.jsonl", "--output", "-"], "none.jsonl"),
    ("verify.py", ["--input", "HERE/bad.jsonl", "--output", "-"], "no row can be read"),
    ("verify.py", ["--input", "HERE/good.jsonl", "--output", "HERE/no/where"], "no such folder"),
    ("evaluate.py", ["--n", "0"], "--n: must be at least 1"),
    ("evaluate.py", ["--data", "HERE/none.jsonl"], "none.jsonl"),
    ("evaluate.py", ["--data", "aime2"], "aime24"),
    ("evaluate.py", ["--data", "HERE/bad.jsonl"], "bad.jsonl"),
    ("evaluate.py", ["--data", "HERE/nogold.jsonl"], "nogold.jsonl"),
    ("evaluate.py", ["--model", "HERE"], "no config.json"),
    ("evaluate.py", ["--output", "HERE/good.jsonl"], "is a file"),
    ("evaluate.py", ["--output", "HERE/taken"], "holds a samples.jsonl"),
    ("evaluate.py", ["--compare", "HERE/none", "HERE"], "no such folder"),
    ("evaluate.py", ["--scores", "HERE/good.jsonl"], "--scores needs --output"),
    ("evaluate.py", ["--scores", "x", "--output", "HERE"], "holds no evaluation"),
    ("evaluate.py", ["--scores", "a/x.jsonl,b/x.jsonl", "--output", "HERE"], "called alike"),
    ("evaluate.py", ["--samples", "HERE/none.jsonl"], "none.jsonl"),
    ("evaluate.py", ["--samples", "HERE/bad.jsonl"], "bad.jsonl:1"),
    ("evaluate.py", ["--samples", "HERE/good.jsonl", "--generative"], "--samples"),
    ("evaluate.py", ["--fit-threshold", "HERE/good.jsonl"], "good.jsonl:1"),
    ("verify.py", ["--problem", "x", "--solution", "y", "--fit-threshold", "HERE/none"], "none"),
]


@pytest.mark.parametrize("script, arguments, said", BAD, ids=[f"{b[0]}: {b[2]}" for b in BAD])
def test_bad_input_is_one_line_and_exit_2(call, tmp_path, script, arguments, said):
    (tmp_path / "bad.jsonl").write_text("{\n")
    write_rows(tmp_path / "nogold.jsonl", [{"problem": "x"}])
    write_rows(tmp_path / "good.jsonl", [{"problem": "x", "answer": "1", "response": "y"}])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "samples.jsonl").write_text("")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(script, *(a.replace("HERE", str(tmp_path)) for a in arguments))
    errors = [x for x in err.splitlines() if not x.startswith("warning: ")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: "), err
    assert said in errors[0]
    assert sorted(tmp_path.rglob("*")) == before  # nothing was left behind
