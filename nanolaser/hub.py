"""
The one place that touches the network: fetch some files of a repository on the Hugging Face hub.

Everything goes through the huggingface_hub library, so its cache (HF_HOME, HF_HUB_CACHE), offline
mode (HF_HUB_OFFLINE=1), token (HF_TOKEN, `hf auth login`) and mirror (HF_ENDPOINT) work as its
users know them.  What is here is one clear line for each way in which it can fail.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

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
