"""Pushing a run's artefact to the Hugging Face hub. Private unless told otherwise; nothing secret leaves.

The token is the one huggingface_hub finds (a login or HF_TOKEN); it is never written or shown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pegbox.artefact import read
from pegbox.artefact.manifest import artefact_folder
from pegbox.errors import BadInput, RunFailed

__all__ = ["export_hub", "find_secrets"]

_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{32,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]+:[^/\s:@]+@"
)
_TEXT = {".json", ".jsonl", ".md", ".txt", ".yaml", ".jinja"}
_LARGE = 1 << 26  # bytes: vocabularies and data beyond this are not read


def find_secrets(folder: Path) -> list[str]:
    """Text files in `folder` that hold something of the shape of a token, key or password, as relative paths."""
    texts = [p for p in sorted(folder.rglob("*")) if p.suffix in _TEXT and p.is_file() and p.stat().st_size <= _LARGE]
    return [
        path.relative_to(folder).as_posix()
        for path in texts
        if _SECRETS.search(path.read_text(encoding="utf-8", errors="replace"))
    ]


def export_hub(run: str | Path, repository: str, *, private: bool = True) -> dict[str, Any]:
    """Verify the artefact and upload its folder.

    Returns: the repository, its address and the commit.

    Raises:
        BadInput: no login, no permission, a bad name, or a file that looks as if it held a secret.
        Corrupt: the artefact is damaged. RunFailed: the hub can't be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = artefact_folder(run)
    read(folder)
    if secrets := find_secrets(folder):
        raise BadInput(
            f"{', '.join(secrets)} in {folder} seems to hold a token, key or password; nothing was uploaded."
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message="Upload with pegbox", ignore_patterns=[".*"]
        )
    except HFValidationError as error:
        raise BadInput(f"'{repository}' is not a repository name ({error}). Give owner/name.") from error
    except LocalTokenNotFoundError as error:
        raise BadInput("Not logged in to the hub. Run 'hf auth login' first, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        raise BadInput(f"The hub refused '{repository}': {str(error).strip().splitlines()[0]}") from error
    except OSError as error:
        raise RunFailed(f"The hub can't be reached ({error}).") from error
    return {"repository": repository, "url": f"https://huggingface.co/{repository}", "commit": done.oid}
