"""Upload an exported folder to the hub."""

import os
import re
from pathlib import Path

from nanolab.cli import UserError
from nanolab.interop.export import FILES


def check_push(repo: str) -> None:
    """Raise UserError unless `repo` can be a repository and there is a token to write it with."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(
            f"--push {repo} is not a repository; expected USER/NAME; try --push USER/{Path(repo).name or 'NAME'}"
        )
    if not get_token():
        raise UserError(
            "--push needs a token that may write to the hub, and none is set; type hf auth login, or set HF_TOKEN"
        )


def push(folder: Path, repo: str) -> str:
    """Upload the folder to the hub; returns its address. A new repository is private; what an earlier export left in an
    old one goes.

    Raises UserError saying what to type, where it cannot be done; the folder stays.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo, commit_message="Export from nanolab", delete_patterns=sorted(FILES)
        )
    except (OSError, HTTPError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"{repo} could not be uploaded: {why or type(error).__name__}; the folder {folder} is whole; type hf upload"
            f" {repo} {folder}"
        ) from None
    return str(address)
