"""Ranks that fine-tune and upload to a hub that is not there. Arguments: its folder, "works" or "fails", flags."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
from huggingface_hub import constants

from bge_ds import finetune


def main(folder: str, how: str, *words: str) -> None:
    hub = Path(folder)

    class Hub:
        def whoami(self):
            (hub / "asked").open("a").write("whoami\n")

        def create_repo(self, name, private, exist_ok):
            (hub / "repository.json").write_text(json.dumps([name, private, exist_ok]))
            return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            if how == "fails":
                raise ConnectionError("the hub\nwent away")
            for name in allow_patterns:
                target = hub / repo_id / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder_path) / name, target)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    huggingface_hub.HfApi = Hub
    huggingface_hub.get_token = lambda: "hf_secret"
    constants.HF_HUB_OFFLINE = False
    # Names of models and tokenizers are folders here: nothing else asks the hub.
    sys.exit(finetune.main(list(words)))
