"""Upload of an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dataflex_pipeline.errors import DataflexError, UserError


def check_upload(name: str) -> str:
    """Check what can be checked before anything is made.

    Args:
        name: of the repository, ``user/name``.

    Returns:
        The token to upload with.

    Raises:
        UserError: the name is none, or no token is set.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"--push-to-hub {name} is no name of a repository.",
            str(error).splitlines()[0],
            "Write user/name, or name alone for your own account.",
        ) from error
    token = get_token()
    if not token:
        raise UserError(
            f"--push-to-hub {name} was given, and no token is set.",
            "The hub takes uploads only from accounts that it knows.",
            "Set the environment variable HF_TOKEN, or log in once with `hf auth login`.",
        )
    return token


def upload(folder: Path, name: str, token: str, public: bool, kind: Literal["model", "data"]) -> str:
    """Upload a finished export, private unless ``public``.

    Returns:
        Where it is.

    Raises:
        DataflexError: the hub refused it or could not be reached; the export is there all the same.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repo_type = "model" if kind == "model" else "dataset"
    client = HfApi(token=token)
    try:
        made = client.create_repo(name, private=not public, exist_ok=True, repo_type=repo_type)
        client.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            repo_type=repo_type,
            commit_message="Export of dataflex-pipeline",
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise DataflexError(
            f"The upload to {name} failed: {str(error).strip().splitlines()[0]}",
            "The hub refused it or could not be reached.",
            f"Nothing is lost: the export is in {folder}. Run the same command again to upload it.",
        ) from error
    return str(made)
