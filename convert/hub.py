"""Repositories on the Hugging Face Hub: what a conversion downloads, and what it uploads."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

# All that a conversion reads beside the weights; the README for its licence.
SETTINGS = [
    "README.md",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]

# Weights in the order of preference: many repositories hold both.
WEIGHTS = [
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
]


def is_repository_id(name: str) -> bool:
    """Whether this could be ``owner/name``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def download(repository: str, revision: str | None = None) -> Path:
    """The local folder of a repository's checkpoint, of which nothing is fetched twice.

    A download that broke off goes on where it stopped.

    Raises:
        ValueError: If there is no such repository or revision, access is denied, or
            the connection fails.
    """
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=SETTINGS + WEIGHTS[0]
        )
        for patterns in WEIGHTS[1:]:
            if any(Path(folder).glob(WEIGHTS[0][0])):
                break
            # The same commit, should the branch have moved on.
            snapshot_download(
                repository, revision=Path(folder).name, allow_patterns=SETTINGS + patterns
            )
    except Exception as error:  # The client's errors share no base class.
        raise ValueError(
            f"{repository} is not a folder, and downloading it from the Hub failed: "
            f"{_reason(error, repository, revision)}"
        ) from error
    return Path(folder)


def upload(folder: Path, repository: str) -> str:
    """Makes ``folder`` the content of a model repository, which is created if need be.

    Returns:
        The repository's address.

    Raises:
        ValueError: If access is denied or the connection fails; ``folder`` is left as it is.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload by hgrn2-mlx"
        )
    except Exception as error:
        raise ValueError(
            f"{folder} is complete, but uploading it to {repository} failed: "
            f"{_reason(error, repository)} (to try again: hf upload {repository} {folder})"
        ) from error
    return str(address)


def _reason(error: Exception, repository: str, revision: str | None = None) -> str:
    """The client's messages run over many lines: what matters of them, in one."""
    if isinstance(error, GatedRepoError):
        return (
            f"it is gated: accept its terms on its page, then log in (hf auth login) "
            f"as who did, or set HF_TOKEN ({_status(error)})"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub has no repository {repository}, or it is private: "
            f"log in with hf auth login ({_status(error)})"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision} ({_status(error)})"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"access denied: log in with hf auth login ({_status(error)})"
    return " ".join(str(error).split()) or type(error).__name__


def _status(error: HfHubHTTPError) -> str:
    return f"HTTP status {error.response.status_code}"
