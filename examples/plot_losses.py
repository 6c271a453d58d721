"""Draws the loss curves of one or more runs from their `metrics.jsonl` into one picture.

python examples/plot_losses.py --output losses.png runs/pretrain/metrics.jsonl runs/finetune/metrics.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # write files; no screen is needed
import matplotlib.pyplot as plt

CURVES = ("loss", "encoder_loss", "decoder_loss")


def read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Curve name -> (steps, values), for the losses that the file holds."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    curves = {}
    for name in CURVES:
        points = [(row["step"], row[name]) for row in rows if "step" in row and row.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            curves[name] = (list(steps), list(values))
    if not curves:
        raise ValueError(f"{path} holds none of {', '.join(CURVES)}")
    return curves


def plot(paths: list[Path], output: Path) -> None:
    """One panel a file, titled by its folder."""
    figure, panels = plt.subplots(1, len(paths), figsize=(5 * len(paths), 3.5), squeeze=False, layout="constrained")
    for path, panel in zip(paths, panels[0], strict=True):
        for name, (steps, values) in read_curves(path).items():
            panel.plot(steps, values, label=name.replace("_", " "))
        panel.set(title=path.resolve().parent.name, xlabel="optimizer step", ylabel="nats")
        panel.grid(alpha=0.3)
        panel.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws loss curves.")
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.jsonl of a run")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.png, .svg, .pdf)")
    args = parser.parse_args()
    try:
        plot(args.metrics, args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"loss curves in {args.output}")


if __name__ == "__main__":
    main()
