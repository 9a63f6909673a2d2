"""Checkpoints in the Hugging Face hub: which text is the id of a repository, and which commit was read."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from .containers import first_line
from .errors import CheckpointError

DOWNLOADED = ["*.json", "*.txt", "*.jinja", "*.pt", "*.safetensors"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".pt", ".json", ".safetensors", ".bin")
COMMIT = re.compile(r"[0-9a-f]{40}")
CACHED = "models--"  # before a repository's name in the hub's cache


def is_hub_id(source: str | Path) -> bool:
    """Whether this means a repository: `owner/name`, where neither it nor the folder `owner` is here."""
    text = str(source)
    if Path(text).exists() or not HUB_ID.fullmatch(text) or text.endswith(FILES):
        return False
    return not Path(text).parent.exists()


def snapshot(repository: str, revision: str | None) -> Path:
    """The folder of a repository's files at a revision (a branch, tag or commit; the newest by default),
    downloaded as far as needed. A line on stderr says so. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    at = f", revision {revision}" if revision else ""
    print(f"{repository} is no path here: taken as a repository of the hub{at}", file=sys.stderr, flush=True)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub's errors share no base class with those of its HTTP library
        raise CheckpointError(
            "the source is neither a local path nor a repository that could be downloaded",
            where=f"{repository}{at}: {first_line(error)}",
            fix="check the spelling and the network, or download the repository and give its folder",
        ) from None


def commits_of(paths: Iterable[Path]) -> dict[str, str]:
    """Repository -> commit of the paths that lie in the hub's cache, as its folders name them."""
    found = {}
    for path in paths:
        for folder in (path, *path.parents):
            home = folder.parent.parent.name
            if (
                folder.parent.name == "snapshots"
                and home.startswith(CACHED)
                and COMMIT.fullmatch(folder.name)
            ):
                found[home.removeprefix(CACHED).replace("--", "/", 1)] = folder.name
    return dict(sorted(found.items()))
