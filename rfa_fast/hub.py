"""What was fetched from the Hugging Face hub earlier, found in its local cache by name.

Nothing is fetched from here, whatever the hub's own settings say: a name that is not in the cache is
not found, and the caller says which command brings it. The cache's layout belongs to huggingface_hub,
which is therefore asked rather than imitated.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

_NAME = re.compile(r"(datasets/)?([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def is_name(text: str) -> bool:
    """Whether a repository could be called so.

    Example:
        >>> is_name("distilbert/distilbert-base-uncased"), is_name("./my-bert")
        (True, False)
    """
    return bool(_NAME.fullmatch(text)) and "--" not in text and ".." not in text


def hub_folder(name: str) -> Path | None:
    """The folder in the hub's local cache that holds a repository's files, `None` when it is not there.

    Args:
        name: as in the repository's address: `"distilbert/distilbert-base-uncased"` for a model,
            `"datasets/stanfordnlp/imdb"` for a data set. The revision is `main`, as it was fetched last.

    Example:
        >>> hub_folder("nobody/has-this") is None
        True
    """
    if not is_name(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    kind: Literal["dataset", "model"] = "dataset" if name.startswith("datasets/") else "model"
    try:
        return Path(snapshot_download(name.removeprefix("datasets/"), repo_type=kind, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def fetch_command(name: str) -> str:
    """The command that brings a repository into the local cache.

    Example:
        >>> fetch_command("datasets/stanfordnlp/imdb")
        'hf download stanfordnlp/imdb --repo-type dataset'
    """
    data = name.startswith("datasets/")
    return f"hf download {name.removeprefix('datasets/')}" + (" --repo-type dataset" if data else "")
