"""Uploading the finished model to the Hugging Face hub (--push_to_hub). The token is the environment's."""

from __future__ import annotations

import os
from pathlib import Path

from bge_ds.config.arguments import TrainArguments


def check(args: TrainArguments) -> None:
    """Refuse, before the first step, an upload that cannot succeed. Asks the hub who the token belongs to, on rank 0 alone."""
    if not args.push_to_hub or os.environ.get("RANK", "0") != "0":
        return
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import validate_repo_id

    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or drop --push_to_hub")
    try:
        validate_repo_id(_repository(args))
    except ValueError as error:
        raise ValueError(f"--hub_model_id {_repository(args)}: {_one_line(error)}") from None
    if get_token() is None:
        raise ValueError("--push_to_hub needs a token that may write: set HF_TOKEN, or run `hf auth login`")
    try:
        HfApi().whoami()
    except Exception as error:  # of the network, of the hub: whatever it is, the upload would fail of it
        raise ValueError(f"--push_to_hub: the hub does not take the token, or cannot be reached ({_one_line(error)})") from None


def push(args: TrainArguments, folder: Path, files: list[str]) -> str:
    """Upload the `files` of a folder into the repository, which is made where there is none; its address.

    Raises ValueError where that fails: the model stays on the disk.
    """
    from huggingface_hub import HfApi

    name = _repository(args)
    try:
        api = HfApi()
        name = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=files, commit_message="Model trained with bge_ds"
        )
    except Exception as error:  # whatever fails, hours of training must not look lost
        raise ValueError(
            f"--push_to_hub: the model could not be uploaded to {name} ({_one_line(error)}); it is whole in {folder}, and "
            f"`hf upload {name} {folder} --exclude 'checkpoint-*' 'runs/*'` sends it"
        ) from None
    return str(getattr(done, "commit_url", done))


def _repository(args: TrainArguments) -> str:
    return args.hub_model_id or Path(args.output_dir).resolve().name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
