"""
Everything on disk: one reader of JSON, one of JSONL, one writer of whole files; on top of them the
folder of a run; and the hub, from which files come that are not on disk yet.

    runs/NAME/config.json     every option and version: enough to repeat the run
             /metrics.jsonl   a line a step           /samples.jsonl  some rollouts a step
             /evals.jsonl     a line an evaluation    /summary.json   before, after, cost
             /report.html     to look at it          /checkpoints/step-000120, .../latest

Three promises, kept here for the whole project:
*  What is read is what it claims to be: a damaged file is one line that names it and the place,
   never a traceback ten minutes later.
*  What is written is whole or absent: a crash or a full disk leaves what was there before.  Logs,
   the exception, grow a line at a time, and are cut back to the checkpoint's step on resume.
*  Two runs never share a folder.

Nothing here imports torch at the top: reading a file of problems is instant.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import stat
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: there, runs are not protected from each other
    fcntl = resource = None


# ---------------------------------------------------------------------------------------------
# reading


def parse_json(data: bytes, where: str | Path, kind: type = dict, **hooks: Callable) -> Any:
    """The JSON value of some bytes; ValueError, one line that begins with `where`, if they are not
    JSON in UTF-8 or hold another kind of value.  `hooks` go to json.loads (parse_int=str)."""

    def number(text: str, kind: type = float) -> float:
        # NaN is no JSON, and 1e999 no float, but Python reads both; and of an integer of 400 digits
        # nobody can take a mean.  Refused here, not noticed hours later in a sum.
        if abs(kind(text)) < 1e300:
            return kind(text)
        raise ValueError(f"{text:.20} is no number")

    hooks = {"parse_float": number, "parse_constant": number,
             "parse_int": lambda text: number(text, int), **hooks}
    # Every way in which bytes can fail to be JSON ends in the same kind of line.
    try:
        value = json.loads(data.decode("utf-8-sig"), **hooks)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is damaged: not UTF-8 text (byte {error.start + 1})") from None
    except RecursionError:  # [[[[... a hundred thousand deep: no traceback for a hostile file
        raise ValueError(f"{where} is damaged: nested too deeply") from None
    except ValueError as error:
        # "line 1" would be read as the line of the file, which `where` tells already
        why = str(error).replace("line 1 column", "column")
        raise ValueError(f"{where} is damaged: not JSON ({why})") from None
    if not isinstance(value, kind):
        name = {dict: "object", list: "list"}.get(kind, kind.__name__)
        raise ValueError(f"{where} is damaged: not a JSON {name}")
    return value


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The JSON value in a file; ValueError and OSError, one line, name the file."""
    return parse_json(Path(path).read_bytes(), path, kind)


def read_jsonl(
    path: str | Path, fields: Mapping[str, type | tuple[type, ...]] | None = None, *,
    data: bytes | None = None, cut: bool = False,
    on_damage: Callable[[int, str], None] | None = None, **hooks: Callable,
) -> Iterator[tuple[int, dict]]:  # fmt: skip
    """(line number from 1, row) of each JSON object, a line each, read as they are asked for; of
    the file, or of `data` in its place.  `fields`: keys that every row must have, and their types.
    `cut`: a last line that a crash cut short is no row.  ValueError "PATH:LINE is damaged: ..." for
    all else; with `on_damage`, it is told (line, why), and the next lines are read."""
    # fields={"step": int, "lr": (float, int)} refuses {"lr": 0.1} and {"step": "2", "lr": 0.1}.
    # Bytes, split at newlines only: text mode would also split at characters such as U+2028,
    # which may stand unescaped inside a JSON string.  And lazily: ten rows cost ten.
    with open(path, "rb") if data is None else io.BytesIO(data) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = parse_json(line, where, **hooks)
                for name, types in (fields or {}).items():
                    if name not in row:
                        raise ValueError(f"{where} is damaged: no {name}")
                    # by type, not isinstance: True is an int to Python, and to nobody else
                    if type(row[name]) not in (types if isinstance(types, tuple) else (types,)):
                        raise ValueError(f"{where} is damaged: {name} is {row[name]!r:.60}")
            except ValueError as error:
                if cut and not line.endswith(b"\n"):
                    return  # nothing can follow it: only a last line has no newline
                if on_damage is None:
                    raise
                on_damage(number, str(error).removeprefix(f"{where} is damaged: "))
                continue
            yield number, row


def read_log(path: Path, fields: Mapping[str, Any] | None = None) -> list[dict]:
    """The rows of a file that grows line by line, [] if there is none; ValueError for a line that
    is no row with these fields, save a last one that a crash cut short."""
    return [row for _, row in read_jsonl(path, fields, cut=True)] if path.exists() else []


# ---------------------------------------------------------------------------------------------
# writing


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: OSError if the disk is full or read-only, and the old file
    stays.  A link is followed; what is no regular file (a pipe, /dev/null) is written to."""
    # Beside it, flushed to the disk, then renamed over it: a rename is one step for the disk, so
    # whoever reads, also after a power cut, finds the old content or the new.
    content = content.encode() if isinstance(content, str) else content
    path, real = Path(path), Path(os.path.realpath(path))
    # With the process id: two runs never write into one temporary file.
    temporary = real.with_name(f"{real.name}.{os.getpid()}.tmp")
    try:
        mode = path.stat().st_mode if path.exists() else None  # of what a link leads to
        if mode is not None and not stat.S_ISREG(mode):
            path.write_bytes(content)
            return
        with open(temporary, "wb") as file:
            file.write(content)
            # Without fsync the rename can reach the disk before the content does, and a power
            # cut in between leaves an empty file under the real name.
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, stat.S_IMODE(mode))  # a file made private stays so
        os.replace(temporary, real)
        sync_folder(real.parent)
    except OSError as error:
        # The user's name for it, not the temporary one (a full disk gives no name at all).
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):  # after the rename there is none
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: a rename is on the disk only once its folder is."""
    # The content of a file and its name in a folder are two writes to the disk.
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def finite(value: Any) -> Any:
    """The value with None for NaN and infinities, however deep: they are not JSON."""
    # A gradient norm may be NaN, and is logged then of all times: null, which every reader takes.
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> str:
    """A value as the text of a JSON file."""
    return json.dumps(finite(value), indent=2) + "\n"


def to_jsonl(rows: Iterator[dict] | Sequence[dict]) -> str:
    """Rows as lines of JSON, None where a number is none."""
    return "".join(json.dumps(finite(row)) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------
# a run

# The logs of a training run, and of their rows what is read again when it is resumed.
NUMBER = (int, float)
LOGS = {
    "metrics.jsonl": {"step": int, "seconds_rollout": NUMBER, "seconds_check": NUMBER,
                      "seconds_update": NUMBER, "response_tokens": NUMBER},
    "samples.jsonl": {"step": int},
    "evals.jsonl": {"step": int, "n": int, "accuracy": (*NUMBER, type(None)), "verification": dict,
                    "majority_vote": dict, "weighted_vote": dict},
}  # fmt: skip


class RunFolder:
    """The files of one run; holds the folder's lock as long as it lives.

    `first`: of many ranks one writes and locks.  To the others the folder is theirs to read, and
    what they write is not written: so no caller has to ask which rank it is.
    """

    def __init__(self, path: str | Path, first: bool = True):
        self.path, self.first = Path(path), first
        self.on_append = lambda name, rows: None  # hears of every line written to a log
        if not first:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{path} is a file, not a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        # A lock that the process holds: a file that merely exists would outlive a crash, and lock
        # out the run that is to be resumed.
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, lock)  # the lock goes with the object, or the process
        if fcntl is None:
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is in use by another run; give this one a folder of its own"
                             ) from None
        # What a killed process was writing: under the lock it is nobody's who still lives.
        # By our own patterns only, for the folder may turn out to be somebody else's.
        for pattern in ("*.json*.[0-9]*.tmp", "checkpoints/latest.[0-9]*.tmp"):
            for left in self.path.glob(pattern):
                left.unlink()
        for left in self.path.glob("checkpoints/step-*.incomplete.tmp"):
            shutil.rmtree(left)  # as large as a checkpoint

    @classmethod
    def create(cls, out: str | None, name: str, config: dict) -> RunFolder:
        """A new run's folder: `out`, or runs/NAME, runs/NAME-2, ... where none is given.
        ValueError if `out` holds a run already: results are never overwritten."""
        # Only unnamed runs are numbered: a name that somebody gave is meant.
        free = (p for p in numbered(Path("runs") / name) if not (p / "config.json").exists())
        path = Path(out) if out else next(free)
        run = cls(path)  # locked: now nobody else can be about to do the same
        if (path / "config.json").exists():
            there = run_of(path)  # None: unreadable, and of what it is nobody can say
            differ = differences(there, config) if there else ""
            raise ValueError(f"{path} holds a run already{differ and f' ({differ})'}; --resume "
                             f"{path} continues it, another --out begins a new one")
        run.describe("options", config)
        return run

    @classmethod
    def reopen(cls, path: str) -> tuple[RunFolder, dict]:
        """An existing run's folder and its options; ValueError where there is none."""
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"--resume {path}: no run there (config.json is missing)")
        options = described(Path(path), "options")
        return cls(path), options

    def describe(self, kind: str, value: dict) -> None:
        """Write config.json: what the folder holds ("options" of a training run, or what an
        "evaluation" is of), and the versions it was made with."""
        import torch  # here: see the top

        # What is missing when the same options give other numbers a year later.
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        self.write_json("config.json", {kind: value, "versions": versions})

    def write_json(self, name: str, value: dict) -> None:
        """Write a JSON file whole or not at all."""
        # indented: people read config.json and summary.json
        if self.first:
            write_atomic(self.path / name, to_json(value))

    def append(self, name: str, rows: list[dict]) -> None:
        """Add lines to one of the logs; every row tells its `step`."""
        if not self.first:
            return
        try:
            with open(self.path / name, "a+b") as file:
                # What a crash cut short, `{"step": 7, "rew`, must not become half of a new line.
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":
                        file.seek(0)
                        file.truncate(file.read().rfind(b"\n") + 1)
                file.write(to_jsonl(rows).encode())
                file.flush()
                os.fsync(file.fileno())  # a checkpoint on the disk has the lines of its steps there
        except OSError as error:
            error.filename = str(self.path / name)  # a full disk does not say by itself
            raise
        self.on_append(name, rows)

    def read(self, name: str, fields: Mapping[str, Any] | None = None) -> list[dict]:
        """The rows of a log, see read_log."""
        return read_log(self.path / name, fields)

    def cut_back(self, step: int) -> None:
        """Forget every log line after `step`: those steps are about to be done again."""
        # Checkpoint 120, killed in step 137: lines 121 to 136 go, and come again, the same ones.
        for name, fields in LOGS.items() if self.first else ():
            kept = [row for row in self.read(name, fields) if row["step"] <= step]
            write_atomic(self.path / name, to_jsonl(kept))

    # -- checkpoints -------------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.path / "checkpoints" / f"step-{step:06d}"

    def point_latest(self, step: int) -> None:
        """Name the checkpoint of `step`, whole on disk by now, as the newest."""
        # Last of all: until this line is written, a resumed run goes on from the one before.
        if self.first:
            latest = self.path / "checkpoints" / "latest"
            write_atomic(latest, self.checkpoint(step).name + "\n")

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None before the first; ValueError if it is gone."""
        return latest_checkpoint(self.path)


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that a run's checkpoints/latest names, None if there is no such file;
    ValueError if it names none, or anything but a checkpoint of this very run."""
    pointer = run / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    # A small file and no link, which archives and Windows lose.
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    # A name and no path: ../../other/checkpoints/step-000120 is another run's.
    there = re.fullmatch(r"step-\d+", name) and (pointer.parent / name / "config.json").is_file()
    if not there:
        left = sorted(p.parent.name for p in pointer.parent.glob("step-*/config.json"))
        raise ValueError(
            f"{pointer} names {name!r:.80}, which is no checkpoint of this run; put into it the "
            f"name of one that is there ({', '.join(left[-3:]) or 'there is none'})"
        )
    return pointer.parent / name


def numbered(path: Path) -> Iterator[Path]:
    """runs/a, runs/a-2, runs/a-3, ..."""
    yield path
    yield from (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))


def run_of(path: str | Path) -> dict | None:
    """The options of the training run that a folder is, or is a checkpoint of; None for all other
    paths and names."""
    path = Path(path).expanduser().absolute()
    # runs/a, runs/a/checkpoints, runs/a/checkpoints/step-000120: all of them are of the run a.
    if path.parent.name == "checkpoints":
        path = path.parent
    with contextlib.suppress(ValueError, OSError):
        return described(path.parent if path.name == "checkpoints" else path, "options")
    return None


def described(folder: Path, kind: str) -> dict:
    """What `describe` wrote into a folder's config.json; ValueError if it holds nothing of that
    kind (models have a config.json, too)."""
    value = read_json(folder / "config.json").get(kind)
    if not isinstance(value, dict):
        raise ValueError(f"{folder / 'config.json'} is damaged, or that of something else: it "
                         f"holds no {kind}")
    return value


def differences(there: dict, here: dict) -> str:
    """How two configurations differ, as part of a sentence: "lr 0.1 there, 0.2 here"."""
    # Three say enough; who has started something else would get forty.
    differ = [f"{k} {there.get(k)} there, {v} here" for k, v in here.items() if there.get(k) != v]
    return "; ".join([*differ[:3], *["..."][: len(differ) > 3]])


def peak_memory_bytes(device: Any) -> int:
    """The most memory this process ever held: on the GPU if `device` (torch's) is one, else
    resident."""
    # What the allocator held: what torch keeps in its pool beyond that can be given back.
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage there starts from the parent's peak, not from zero
        line = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(line[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


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
        raise ValueError(f"{name} is on the Hugging Face hub: pip install huggingface_hub, or name "
                         "a local path") from None
    # Only what matches is fetched: a repository may hold the same weights in three formats.
    # The library's HTTP error derives from that of whichever HTTP library it uses in this
    # version; so do time-outs and broken connections, which it does not always wrap.
    failures = (OSError, ValueError, *errors.HfHubHTTPError.__bases__)
    try:
        return Path(huggingface_hub.snapshot_download(
            match["repo"], repo_type=kind, revision=match["revision"],
            allow_patterns=list(patterns)))
    except failures as error:
        place = f"{'datasets/' if kind == 'dataset' else ''}{match['repo']}"
        # From the narrow class to the wide one: a gated repository is also one that is not found.
        for reason, text in {
            errors.GatedRepoError: f" is gated: accept its terms at https://huggingface.co/{place},"
            " then `hf auth login` or set HF_TOKEN",
            errors.RepositoryNotFoundError:
            f": no such {kind} on the hub (or a private one: `hf auth login`)",
            errors.RevisionNotFoundError: ": the repository has no such revision",
            errors.LocalEntryNotFoundError: " is not in the cache and the hub cannot be reached "
            "(offline, or no network): connect once, point HF_HUB_CACHE at a cache that has it, or "
            "name a local path",
        }.items():
            if isinstance(error, reason):
                raise OSError(name + text) from None
        # All else, in the library's words: their first line, for some go on for a page.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{name}: the download failed; repeat it, and it goes on where it ended "
                      f"({first_line})") from None
