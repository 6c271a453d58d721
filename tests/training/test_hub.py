"""Uploading: the finished model alone goes to the hub, once; whatever fails there, the model stays and the command says so."""

from __future__ import annotations

import subprocess
from pathlib import Path

import helpers
import huggingface_hub
import pytest
from huggingface_hub import constants
from transformers import AutoModel

from bge_ds.config.arguments import FinetuneArguments
from bge_ds.training import hub

FLAGS = ["--max_steps", "2", "--save_steps", "1", "--dataloader_num_workers", "0", "--use_cpu", "--push_to_hub"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    return helpers.make_training_folder(tmp_path_factory.mktemp("base"))


def words_of(setting: Path, output: Path, *more: str) -> list[str]:
    flags = helpers.command_flags(setting)["finetune"] | {"model_name_or_path": setting / "model", "output_dir": output}
    flags |= {"cache_dir": setting / "cache"}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))] + FLAGS + list(more)


def test_the_finished_model_is_uploaded_once(tmp_path, setting):
    """By one of two ranks, with its card, and without checkpoints, logs or whatever else lies in the folder."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    words = words_of(setting, out, "--hub_model_id", "us/model", "--hub_private_repo", "--overwrite_output_dir")
    said = helpers.run_ranks("pushing_run", 2, tmp_path, "works", *words)
    uploaded = tmp_path / "us/model"
    names = {path.relative_to(uploaded).as_posix() for path in uploaded.rglob("*") if path.is_file()}
    assert {"README.md", "config.json", "model.safetensors", "modules.json", "1_Pooling/config.json"} <= names
    assert not [name for name in names if name.startswith(("checkpoint", "runs", "metrics", "notes", "run.lock"))]
    assert all((uploaded / name).read_bytes() == (out / name).read_bytes() for name in names)
    AutoModel.from_pretrained(uploaded)
    assert 'SentenceTransformer("us/model")' in (uploaded / "README.md").read_text()
    assert (tmp_path / "repository.json").read_text() == '["us/model", true, true]'
    assert (tmp_path / "asked").read_text() == "whoami\n"  # once, before the first step
    assert said.count("uploaded to https://hub/us/model/commit/1") == 1 and "hf_secret" not in said


def test_a_failed_upload_leaves_the_model(tmp_path, setting):
    """One line and the status of a mistake; the folder is that of a finished run, and gave the repository its name."""
    out = tmp_path / "out"
    command = helpers.program("pushing_run", tmp_path, "fails", *words_of(setting, out))
    env = helpers.environment(PYTHONPATH=helpers.PYTHONPATH)
    done = subprocess.run(command, cwd=helpers.REPO, env=env, capture_output=True, text=True, timeout=200)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "could not be uploaded to me/out (the hub went away); it is whole in " in line
    assert f"`hf upload me/out {out} --exclude 'checkpoint-*' 'runs/*'` sends it" in line
    assert "done in" in done.stdout and (out / "checkpoint-2").is_dir()
    AutoModel.from_pretrained(out)


class Hub:
    def whoami(self):
        raise huggingface_hub.errors.LocalTokenNotFoundError("no\nsuch token")


def arguments(**flags) -> FinetuneArguments:
    return FinetuneArguments.build(output_dir="out", train_data=["d"], model_name_or_path="m", **flags)


def test_what_cannot_succeed_is_said_before_training(monkeypatch):
    """Hours of training must not end in a token that was never there."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    hub.check(arguments())  # nothing is to be uploaded
    given = arguments(push_to_hub=True)
    with pytest.raises(ValueError, match="--push_to_hub needs a token that may write: set HF_TOKEN"):
        hub.check(given)
    with pytest.raises(ValueError, match="--hub_model_id a/b/c: Repo id must be"):
        hub.check(arguments(push_to_hub=True, hub_model_id="a/b/c"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "t")
    with pytest.raises(ValueError, match=r"the hub does not take the token, or cannot be reached \(no such token\)"):
        hub.check(given)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        hub.check(given)
    monkeypatch.setenv("RANK", "1")
    hub.check(given)  # the first rank asks for all
