"""Downloads from the hub, against a server of our own that speaks its file protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanolaser.checkpoint import load_pretrained
from nanolaser.files import fetch
from nanolaser.problems import DATASETS, load_problems, train_and_test

ROOT = Path(__file__).parents[1]


def publish(hub, folder: Path, name: str = "me/it", **more: bytes) -> None:
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    hub.repositories[f"models/{name}"] = files | more


def fresh(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in a new process: huggingface_hub reads its environment once, when imported."""
    environment = {**os.environ, **env, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )


def test_a_model_by_its_hub_id_and_only_the_files_needed(hub, tiny_checkpoint):
    extra = {"pytorch_model.bin": b"pickle", "README.md": b"# hi", "consolidated.safetensors": b"x"}
    publish(hub, tiny_checkpoint, **extra)
    model, tokenizer = load_pretrained("me/it")
    ours, _ = load_pretrained(tiny_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters()))
    sent = hub.downloads()
    assert sent == sorted(p.name for p in tiny_checkpoint.iterdir())
    # the second time nothing is sent: the cache is the one users know
    load_pretrained("me/it")
    assert hub.downloads() == []


def test_a_repository_of_pickles_alone_is_refused_with_the_reason(hub, tiny_checkpoint):
    publish(hub, tiny_checkpoint, **{"pytorch_model.bin": b"pickle"})
    del hub.repositories["models/me/it"]["model.safetensors"]
    with pytest.raises(OSError, match="no weights there; .*pickle, which can run any code"):
        load_pretrained("me/it")
    assert "pytorch_model.bin" not in hub.downloads()


def test_a_changed_file_is_fetched_again_and_only_that_one(hub):
    hub.repositories["models/me/it"] = {"config.json": b"{}", "laser.json": b"old"}
    first = fetch("me/it", ["*.json"])
    assert hub.downloads() == ["config.json", "laser.json"]
    hub.repositories["models/me/it"]["laser.json"] = b"new"
    second = fetch("me/it", ["*.json"])
    assert hub.downloads() == ["laser.json"]
    assert (second / "laser.json").read_bytes() == b"new"
    # whoever is still reading the old snapshot keeps it
    assert (first / "laser.json").read_bytes() == b"old"


def test_a_broken_download_is_one_line_and_can_be_repeated(hub, monkeypatch):
    content = os.urandom(1 << 20)
    hub.repositories["models/me/it"] = {"model.safetensors": content}
    hub.broken.add("model.safetensors")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between its tries
    with pytest.raises(OSError, match="^me/it: the download failed; repeat it") as error:
        fetch("me/it", ["*.safetensors"])
    assert "\n" not in str(error.value)
    hub.broken.clear()
    assert (fetch("me/it", ["*.safetensors"]) / "model.safetensors").read_bytes() == content


@pytest.mark.parametrize("status, code, words", [
    (404, "RepoNotFound", "no such model on the hub"),
    (401, "RepoNotFound", "no such model on the hub"),
    (403, "GatedRepo", "is gated: accept its terms at https://huggingface.co/me/it"),
    (404, "RevisionNotFound", "no such revision"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_line(hub, status, code, words):
    hub.refuse["models/me/it"] = (status, code)
    with pytest.raises(OSError, match=words) as error:
        load_pretrained("me/it")
    assert "\n" not in str(error.value)
    # owner/name may be a folder that was mistyped, so that is said as well
    assert str(error.value).startswith("there is no folder 'me/it' here, and me/it")


def test_without_network_the_cache_serves_and_else_one_line_says_what_to_do(hub):
    hub.repositories["models/me/it"] = {"config.json": b"{}"}
    fetch("me/it", ["config.json"])
    code = "from nanolaser.files import fetch\n" "print(fetch('{}', ['config.json']))"
    # port 9 (discard): nobody listens, the connection is refused at once
    for env in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        result = fresh(code.format("me/it"), **env)
        assert result.returncode == 0 and "snapshots" in result.stdout, result.stderr
        result = fresh(code.format("me/other"), **env)
        last = result.stderr.strip().splitlines()[-1]
        assert "me/other is not in the cache and the hub cannot be reached" in last
        assert "connect once" in last and "HF_HUB_CACHE" in last


def test_the_users_token_goes_along(hub):
    hub.repositories["models/me/it"] = {"config.json": b"{}"}
    code = "from nanolaser.files import fetch\nfetch('me/it', ['config.json'])"
    assert fresh(code).returncode == 0 and hub.tokens == {None}
    hub.reset()
    hub.repositories["models/me/it"] = {"config.json": b"{}"}
    assert fresh(code, HF_TOKEN="hf_mine").returncode == 0 and hub.tokens == {"Bearer hf_mine"}


def test_an_interrupted_snapshot_is_not_taken_for_a_whole_one(hub):
    hub.repositories["models/me/it"] = {"config.json": b"{}", "model.safetensors": b"12345678"}
    fetch("me/it", ["config.json"])  # the weights were never fetched
    code = "from nanolaser.files import fetch\nfetch('me/it', ['config.json', '*.safetensors'])"
    result = fresh(code, HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert "me/it is not in the cache" in result.stderr.strip().splitlines()[-1]


def test_hub_names_that_are_none():
    for name in ("it", "a/b/c", "../x/y", "a b/c", "me/it@", "mé/it"):
        with pytest.raises(ValueError, match="is not a hub id"):
            fetch(name, ["*"])


def test_a_revision_may_be_named(hub):
    hub.repositories["models/me/it"] = {"config.json": b"{}"}
    assert (fetch("me/it@v1.0", ["*.json"]) / "config.json").is_file()
    assert any("/revision/v1.0" in path for _, path in hub.log)


def test_a_benchmark_by_its_alias(hub):
    rows = b'{"problem": "1+1?", "answer": "2", "unique_id": "a"}\n'
    hub.repositories["datasets/HuggingFaceH4/MATH-500"] = {"test.jsonl": rows, "README.md": b""}
    (problem,) = load_problems("math500")
    assert (problem.id, problem.problem, problem.answer) == ("a", "1+1?", "2")
    assert hub.downloads() == ["test.jsonl"]


def test_a_benchmark_in_several_parquet_files(hub, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    files = {}
    for i in range(2):
        table = pyarrow.table({
            "question": [f"q{i}"], "final_answer": [f"{i}"], "difficulty": [5.5],
            "topic": ["Algebra"], "r1_solution_1": ["long"],
        })  # fmt: skip
        parquet.write_table(table, tmp_path / "x.parquet")
        files[f"data/train-0000{i}-of-00002.parquet"] = (tmp_path / "x.parquet").read_bytes()
    hub.repositories["datasets/zwhe99/DeepMath-103K"] = files
    problems = load_problems("deepmath", split="train")
    assert [(p.problem, p.answer) for p in problems] == [("q0", "0"), ("q1", "1")]
    assert (problems[0].level, problems[0].subject) == ("5.5", "Algebra")
    assert len({p.id for p in problems}) == 2


def test_a_benchmark_with_one_split_is_held_out_from_and_one_with_two_is_not(hub, monkeypatch):
    lines = lambda name: b"".join(  # noqa: E731
        b'{"problem": "%s %d", "answer": "%d"}\n' % (name, i, i) for i in range(10)
    )
    monkeypatch.setitem(DATASETS, "both", ("me/both", {"train": "a.jsonl", "test": "b.jsonl"}))
    hub.repositories["datasets/me/both"] = {"a.jsonl": lines(b"a"), "b.jsonl": lines(b"b")}
    hub.repositories["datasets/HuggingFaceH4/MATH-500"] = {"test.jsonl": lines(b"c")}
    train, test = train_and_test("both", "both", 400)
    assert [p.problem[0] for p in train + test] == ["a"] * 10 + ["b"] * 10
    train, test = train_and_test("math500", "math500", 400)
    assert (len(train), len(test)) == (8, 2)
    assert not {p.problem for p in train} & {p.problem for p in test}


def test_a_benchmark_whose_files_have_moved(hub):
    hub.repositories["datasets/HuggingFaceH4/MATH-500"] = {"other.txt": b""}
    with pytest.raises((ValueError, OSError), match="math500|MATH-500"):
        load_problems("math500")
