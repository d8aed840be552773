"""Uploading a directory to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from rlhf import secrets
from rlhf.errors import Problem, RlhfError

# What the hub's client raises without a connection is no error of its own, but of the library below it.
HTTPError: Any = HfHubHTTPError.__mro__[1]


def require_login(repository: str) -> None:
    """Raise RES012 where nothing could be uploaded: no token, or no hub."""
    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HTTPError, OSError) as error:
        raise _refused(repository, error, "hf auth login, or HF_TOKEN in the environment, while online") from None


def upload(directory: Path, repository: str, public: bool) -> str:
    """Make the repository where it is not there (private, unless ``public``), commit all files; returns its address.

    Raises:
        RlhfError: RES012; the directory stays as it is.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload of an rlhf export")
    except (HTTPError, HFValidationError, OSError) as error:
        raise _refused(repository, error, f"upload {directory} by hand: hf upload {repository} {directory}") from None
    return str(address)


def _refused(repository: str, error: Exception, fix: str) -> RlhfError:
    first = " ".join(secrets.mask(str(error)).split())[:160]
    return RlhfError(Problem("RES012", f"hub: {repository}", f"cannot be used: {first}", fix))
