"""The notebook's cells, run in their order in one process, as a reader would."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import helpers


def test_the_notebook_trains_evaluates_and_searches(tmp_path, minilm_path):
    """Few steps; the rest is what is written there. Its last cell compares the vectors with sentence-transformers'."""
    notebook = json.loads((helpers.REPO / "examples/first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # Only a program with this guard may start the processes that read sources.
    body = "\n".join("    " + line for cell in cells for line in cell.splitlines())
    script = tmp_path / "notebook.py"
    script.write_text(f'if __name__ == "__main__":\n{body}\n', encoding="utf-8")
    environment = helpers.environment(WORK=str(tmp_path), STEPS="2", PYTHONPATH=os.pathsep.join([str(helpers.REPO)]))
    done = subprocess.run(
        [sys.executable, script], cwd=helpers.REPO, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sentence-transformers gives the same vectors" in done.stdout
    assert (tmp_path / "model/model.safetensors").is_file()
    for query in ("read a file line by line", "multiply two matrices"):
        after = done.stdout.split(f"\n{query}\n")[1].splitlines()[:3]
        assert len(after) == 3 and all(line.startswith("  0.") for line in after)
