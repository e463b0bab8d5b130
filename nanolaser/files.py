"""
A run's folder: what is written where, by whom, and what survives a crash.

    runs/NAME/config.json     every option and version: enough to repeat the run
             /metrics.jsonl   a line a step           /samples.jsonl  some rollouts a step
             /evals.jsonl     a line an evaluation    /summary.json   before, after, cost
             /curves.png      (with matplotlib)       /checkpoints/step-000120, .../latest

The .jsonl files grow a line at a time and are cut back to the checkpoint's step on resume;
everything else is written whole or not at all.  A lock held by the process (not a file that a
crash would leave behind) keeps two runs out of one folder.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: there, runs are not protected from each other
    fcntl = resource = None

LOGS = ("metrics.jsonl", "samples.jsonl", "evals.jsonl")


class RunFolder:
    """The files of one run; holds the folder's lock as long as the process lives."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = open(path / ".lock", "w")
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{path} is in use by another run; give this one a folder of its own"
                ) from None
            # What a killed process was writing: under the lock it is nobody's who still lives.
            # By our own patterns only, for the folder may turn out to be somebody else's.
            for pattern in ("*.json*.[0-9]*.tmp", "checkpoints/latest.[0-9]*.tmp"):
                for left in path.glob(pattern):
                    left.unlink()
            for left in path.glob("checkpoints/step-*.incomplete.tmp"):
                shutil.rmtree(left)  # as large as a checkpoint

    @classmethod
    def create(cls, out: str | None, name: str, config: dict) -> RunFolder:
        """A new run's folder: `out`, or runs/NAME, runs/NAME-2, ... where none is given.
        ValueError if `out` holds a run already: results are never overwritten."""
        path = Path(out) if out else Path("runs") / name
        count = 1
        while not out and (path / "config.json").exists():
            count += 1
            path = Path("runs") / f"{name}-{count}"
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {path} is a file, not a folder")
        run = cls(path)
        if (path / "config.json").exists():
            raise ValueError(
                f"{path} holds a run already{_difference(path, config)}; --resume {path} "
                "continues it, another --out begins a new one"
            )
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        run.write_json("config.json", {"options": config, "versions": versions})
        return run

    @classmethod
    def reopen(cls, path: str) -> tuple[RunFolder, dict]:
        """An existing run's folder and its options; ValueError where there is none."""
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"--resume {path}: no run there (config.json is missing)")
        options = _options(Path(path))
        return cls(Path(path)), options

    @classmethod
    def of_first_rank(cls, path: str) -> RunFolder:
        """The folder as the other ranks of a run see it: theirs to read, the first one's to write
        and to lock."""
        run = cls.__new__(cls)
        run.path = Path(path)
        run.write_json = run.append = run.cut_back = run.point_latest = lambda *_: None
        return run

    def write_json(self, name: str, value: dict) -> None:
        """Write a JSON file whole or not at all."""
        write_atomic(self.path / name, json.dumps(finite(value), indent=2) + "\n")

    def append(self, name: str, rows: list[dict]) -> None:
        """Add lines to one of the logs; every row tells its `step`."""
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(finite(row)) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())  # a checkpoint on the disk has the lines of its steps there
        except OSError as error:
            error.filename = str(self.path / name)  # a full disk does not say by itself
            raise

    def read(self, name: str) -> list[dict]:
        """The rows of a log; a last line cut short by a crash is no row."""
        path, rows = self.path / name, []
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def cut_back(self, step: int) -> None:
        """Forget every log line after `step`: those steps are about to be done again."""
        for name in LOGS:
            kept = [row for row in self.read(name) if row["step"] <= step]
            write_atomic(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))

    # -- checkpoints -------------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.path / "checkpoints" / f"step-{step:06d}"

    def point_latest(self, step: int) -> None:
        """Name the checkpoint of `step`, whole on disk by now, as the newest."""
        write_atomic(self.path / "checkpoints" / "latest", self.checkpoint(step).name + "\n")

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None before the first; ValueError if it is gone."""
        pointer = self.path / "checkpoints" / "latest"
        if not pointer.is_file():
            return None
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not (pointer.parent / name / "config.json").is_file():
            left = sorted(p.parent.name for p in pointer.parent.glob("step-*/config.json"))
            raise ValueError(
                f"{pointer} names {name!r}, which is no checkpoint; put into it the name of one "
                f"that is there ({', '.join(left[-3:]) or 'there is none'})"
            )
        return pointer.parent / name


def _options(path: Path) -> dict:
    """The options in a run's config.json; ValueError if it holds none."""
    config = path / "config.json"
    try:
        raw = json.loads(config.read_bytes())
        return dict(raw["options"])
    except (KeyError, TypeError):
        # results of evaluate.py and models have a config.json, too
        raise ValueError(f"{config} is damaged, or not that of a training run") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is damaged: {error}") from None


def _difference(path: Path, config: dict) -> str:
    """How the run in a folder differs from one of these options, as part of a sentence."""
    try:
        there = _options(path)
    except ValueError:
        return ""  # unreadable: what it is of nobody can say
    differ = [f"{k} {there.get(k)} there, {v} here" for k, v in config.items() if there.get(k) != v]
    return f" ({'; '.join(differ[:3])}{'; ...' if len(differ) > 3 else ''})" if differ else ""


def finite(value: Any) -> Any:
    """The value with None for NaN and infinities, however deep: they are not JSON."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process ever held: on the GPU if it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage there starts from the parent's peak, not from zero
        line = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(line[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def is_terminal() -> bool:
    """Is somebody watching?  Progress bars are for terminals; logs get lines."""
    first = os.environ.get("RANK", "0") == "0"  # of many processes
    return first and sys.stderr.isatty() and "CI" not in os.environ

# ---------------------------------------------------------------------------------------------
# writing whole or not at all


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: beside it, flushed to the disk, then renamed over it.
    OSError if the disk is full or read-only; the old file stays as it was."""
    path = Path(path)
    # With the process id: two runs never write into one temporary file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            # Without fsync the rename can reach the disk before the content does, and a power
            # cut in between leaves an empty file under the real name.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # not the temporary name, or none at all
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries: a rename is on the disk only once its folder is."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------
# the Hugging Face hub: the one place that touches the network

# owner/name, optionally @revision (a branch, a tag or a commit)
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def fetch(name: str, patterns: Sequence[str], kind: str = "model") -> Path:
    """The local folder that holds the files of a hub repository which match the patterns.

    `name` is owner/name or owner/name@revision, `kind` model or dataset.  From the cache where
    the files are current.  OSError or ValueError, one line, says what to do when that fails.
    """
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a hub id (owner/name or owner/name@revision)")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:  # optional: who works with folders never needs it
        raise ValueError(
            f"{name} is on the Hugging Face hub: pip install huggingface_hub, or name a local path"
        ) from None
    # The library's HTTP error derives from that of whichever HTTP library it uses in this
    # version; so do time-outs and broken connections, which it does not always wrap.
    failures = (OSError, ValueError, *errors.HfHubHTTPError.__bases__)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                match["repo"],
                repo_type=kind,
                revision=match["revision"],
                allow_patterns=list(patterns),
            )
        )
    except failures as error:
        raise OSError(_explain(name, kind, error, errors)) from None


def _explain(name: str, kind: str, error: Exception, errors) -> str:
    """One line: what went wrong with this repository, and what to do about it."""
    place = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name.split('@')[0]}"
    # from the narrow class to the wide one: a gated repository is also one that is not found
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {place}, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name}: no such {kind} on the hub (or a private one: `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: the repository has no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{name} is not in the cache and the hub cannot be reached (offline, or no network): "
            "connect once, point HF_HUB_CACHE at a cache that has it, or name a local path"
        )
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{name}: the download failed; repeat it, and it goes on where it ended ({first_line})"
