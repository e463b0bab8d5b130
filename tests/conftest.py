"""What the tests share: a tiny random checkpoint, the benchmark files where they are, a small hub.

No test needs the network, and none can reach it: before huggingface_hub is imported anywhere, its
endpoint is set to a server of our own on the loopback interface and its cache to a new folder.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import http.server
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest

# Several test processes share the cores: each thread of one would wait for another's.  Set before
# torch is imported, and inherited by every command that a test starts.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the scripts import nanolaser from beside them

# The benchmark data and two real tokenizers, where somebody has put them beside the project.
SHARED = Path(os.environ.get("NANOLASER_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of benchmark data; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"no benchmark data in {SHARED}")
    return SHARED


# ---------------------------------------------------------------------------------------------
# the scripts


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, arguments...) -> (exit code, stdout, stderr) of the script, in this process."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        gc.collect()  # the folder of the last call is locked until its last trace is gone
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            return (end.code or 0, *capsys.readouterr())
        raise AssertionError(f"{script} did not exit")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in handlers.items():  # train.py has its own
        signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------
# a checkpoint

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|reserved_0|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Grouped-query attention, tied output, a matrix with rows that the tokenizer (261 ids) lacks.
TINY = dict(
    model_type="qwen2", vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    attention_bias=True, max_position_embeddings=512, initializer_range=0.2, eos_token_id=(256,),
)  # fmt: skip


def write_tokenizer(folder: Path, **settings) -> None:
    """Bytes as tokens, five special ones; settings change tokenizer_config.json (None removes)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))


@pytest.fixture(scope="session")
def make_checkpoint():
    """make_checkpoint(folder, seed=0, **changes of the config) writes a random checkpoint."""
    from nanolaser.checkpoint import save_pretrained
    from nanolaser.model import CausalLM, ModelConfig
    from nanolaser.tiny.__main__ import init_weights
    from nanolaser.tokenizer import Tokenizer

    def make(folder: Path, seed: int = 0, **changes) -> Path:
        write_tokenizer(folder / "tokenizer")
        model = init_weights(CausalLM(ModelConfig(**{**TINY, **changes})), seed)
        save_pretrained(model, Tokenizer.from_folder(folder / "tokenizer"), folder)
        shutil.rmtree(folder / "tokenizer")
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint, tmp_path_factory) -> Path:
    """The folder of a random two-layer model in the layout of the hub; not to be written to."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random")


@pytest.fixture
def tiny(tiny_checkpoint):
    """(model, tokenizer) of that folder, loaded anew for each test."""
    from nanolaser.checkpoint import load_pretrained

    return load_pretrained(tiny_checkpoint)


# ---------------------------------------------------------------------------------------------
# a hub: enough of its file protocol for huggingface_hub's downloads


class Hub(http.server.ThreadingHTTPServer):
    """repositories["models/me/it"] = {file name: bytes}; `log` holds every request, `tokens` their
    Authorization headers; `broken` names files whose download ends half-way; `refuse` maps a
    repository to (status, error code)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.reset()

    def reset(self) -> None:
        self.repositories.clear()
        self.log: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.broken: set[str] = set()
        self.refuse: dict[str, tuple[int, str]] = {}

    def downloads(self) -> list[str]:
        """The names of the files that were sent since the last call."""
        sent = [path for method, path in self.log if method == "GET" and "/resolve/" in path]
        self.log.clear()
        return sorted(path.rsplit("/", 1)[1] for path in sent)


class HubRequest(http.server.BaseHTTPRequestHandler):
    """/api/{kind}s/{repo}/revision|tree/{revision} and /{repo}/resolve/{revision}/{file}."""

    def do_GET(self):
        self.server.log.append((self.command, self.path.split("?")[0]))
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api" and len(parts) > 5:
            self.api("/".join(parts[1:4]), parts[4])
        elif "resolve" in parts:
            at = parts.index("resolve")
            kind = "datasets/" if parts[0] == "datasets" else "models/"
            self.file(kind + "/".join(parts[at - 2 : at]), "/".join(parts[at + 2 :]))
        else:
            self.reply(404, b"")

    do_HEAD = do_GET

    def api(self, name: str, what: str) -> None:
        files = self.server.repositories.get(name)
        if name in self.server.refuse or files is None:
            status, code = self.server.refuse.get(name, (404, "RepoNotFound"))
            return self.reply(status, b"", {"X-Error-Code": code})
        if what == "tree":
            answer = [
                {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
                for path, content in files.items()
            ]
        else:
            siblings = [{"rfilename": n} for n in files]
            answer = {"id": name.partition("/")[2], "sha": commit(files), "siblings": siblings}
        self.reply(200, json.dumps(answer).encode())

    def file(self, name: str, path: str) -> None:
        content = self.server.repositories.get(name, {}).get(path)
        if content is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        start, headers = 0, {"ETag": f'"{etag(content)}"', "Accept-Ranges": "bytes"}
        headers["X-Repo-Commit"] = commit(self.server.repositories[name])
        if self.headers.get("Range", "").startswith("bytes="):
            start = int(self.headers["Range"][6:].split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, content[start:], headers, cut=path in self.server.broken)

    def reply(self, status: int, body: bytes, headers=None, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = True

    def log_message(self, *_):
        """Nothing on stderr: the tests ask `log`."""


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


_hub = Hub()
_cache = tempfile.mkdtemp(prefix="nanolaser-test-hub-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{_hub.server_address[1]}",
    "HF_HOME": _cache,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
for _name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)
threading.Thread(target=_hub.serve_forever, daemon=True).start()


@pytest.fixture
def hub():
    """Our hub, empty and with an empty cache."""
    _hub.reset()
    shutil.rmtree(Path(_cache) / "hub", ignore_errors=True)
    yield _hub
    _hub.reset()


def run_readme_snippet(folder: Path, **given) -> dict:
    """The names with which the snippet of docs/using-r_s.md ends, r_s in plain transformers:
    exactly that, on the checkpoint in `folder` and with other values for the names given."""
    page = (ROOT / "docs" / "using-r_s.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (snippet,) = [block for block in blocks if "AutoModelForCausalLM" in block]
    for name, value in {"folder": str(folder), **given}.items():
        line = rf"(?m)^{name} = .*$"
        assert len(re.findall(line, snippet)) == 1, name
        snippet = re.sub(line, lambda _: f"{name} = {value!r}", snippet)
    (folder / "snippet.py").write_text(snippet)
    return runpy.run_path(str(folder / "snippet.py"))
