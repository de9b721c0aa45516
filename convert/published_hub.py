"""Published filters on the Hugging Face hub: downloads and uploads."""

from __future__ import annotations

import re
from pathlib import Path

from ..config import QFilterError
from .text import need_packages, reason

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
"""The files of published filters."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_packages() -> None:
    """QFilterError unless what reads and writes the published format is installed."""
    need_packages("published filters need", "safetensors", "huggingface_hub")


def download(name, files, revision=None):
    """Folder in huggingface_hub's cache (.../<revision>) with those of `files` that the repository
    `name` has. If the hub can't be reached, only the cache is used."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # noqa: BLE001 - the hub, the network or the disk
        raise QFilterError(
            f"{name} is no file or folder here and cannot be downloaded from the Hugging Face hub: "
            f"{reason(error)}; check the name and the network"
        ) from None


def check_upload(repo) -> None:
    """QFilterError unless `repo` is a hub id and there is a token to write to the hub with."""
    check_packages()
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(repo):
        raise QFilterError(f"{repo} is no hub id; give --upload user/name")
    if get_token() is None:
        raise QFilterError(
            "uploading needs a token of the Hugging Face hub; log in with `hf auth login`"
        )


def upload(folder, repo, *, private=False) -> str:
    """Upload what `save` wrote to the hub repository `repo`, which is created if it doesn't exist;
    returns its address. QFilterError if that fails; `folder` stays."""
    check_upload(repo)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    api = HfApi()
    again = f"try again with `hf upload {repo} {folder}`"
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        # create_repo leaves a repository that exists as public as it is
        if private and not api.model_info(repo).private:
            raise QFilterError(f"{repo} exists and is public; give another name with --upload")
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[WEIGHTS, CONFIG, CARD],
            commit_message="Q-filters",
        )
    except QFilterError:
        raise
    except Exception as error:  # noqa: BLE001 - the hub, the network or the token
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            again = f"log in with `hf auth login` as a user with write access, then {again}"
        raise QFilterError(f"cannot upload to {repo}: {reason(error)}; {again}") from None
    return str(address)
