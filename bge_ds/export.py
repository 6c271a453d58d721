"""A trained model as an ONNX file: `python -m bge_ds.export --model_name_or_path out`, which writes `out/onnx/model.onnx`.

The graph pools and normalises as the model's files say. It gets its name only after onnxruntime has given the model's vectors.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from bge_ds.config.embedding_flags import add_model_flags
from bge_ds.config.parser import CommandParser, exit_status

FOLDER = "onnx"  # in the model's own, where sentence-transformers looks for it
NEEDED = ("onnx", "onnxscript", "onnxruntime")
LONGEST = 512  # tokens of the texts that are compared
TEXTS = ["a", "what is a shard", "A shard is a part of a data set, read from a memory map.", "one of many words " * LONGEST]


def parser() -> argparse.ArgumentParser:
    p = CommandParser(prog="bge_ds.export", description=__doc__.split("\n")[0].split(": ")[0], allow_abbrev=False)
    add = p.add_argument
    add("--model_name_or_path", required=True, help="folder or hub name of the model")
    add("--output", type=Path, metavar="FOLDER", help=f"where model.onnx goes (default: {FOLDER} in the model's folder)")
    add("--overwrite", action="store_true", help="replace the model.onnx of an earlier export")
    add_model_flags(p)
    return p


def run(args: argparse.Namespace) -> None:
    """Export, compare, put the file in its place. Raises ValueError for what the user can fix."""
    output = check(args)
    import transformers  # torch is loaded from here on: --help needs none of it

    from bge_ds.checkpoint import filesystem
    from bge_ds.evaluation import retrieval
    from bge_ds.evaluation.embedder import Embedder
    from bge_ds.modeling import onnx_export
    from bge_ds.modeling.encoder import longest_text

    transformers.logging.disable_progress_bar()
    name, how = args.model_name_or_path, {"cache_dir": args.cache_dir, "pooling": args.pooling, "normalize": args.normalize}
    embedder = Embedder.load(name, use_cpu=True, **how)
    print(f"{name}: {', '.join(embedder.settings.sources)}", file=sys.stderr)
    ids = retrieval.tokenize(embedder.tokenizer, TEXTS, min(LONGEST, longest_text(embedder.model.backbone.config)))
    wanted_ND = embedder.model.encode_ids(ids)
    model = onnx_export.PaddedEncoder(embedder.model)
    names = onnx_export.input_names(model.backbone, embedder.tokenizer.model_input_names)
    partial = output.with_name(output.name + filesystem.PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        onnx_export.write(model, names, partial)
        difference = onnx_export.check(partial / onnx_export.FILE, model, names, ids, wanted_ND)
        filesystem.sync(partial)
        output.mkdir(exist_ok=True)
        filesystem.merge_folder(partial, output, last=(onnx_export.WEIGHTS, onnx_export.FILE))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"wrote {output / onnx_export.FILE}: {', '.join(names)} to {', '.join(onnx_export.OUTPUTS)}; in onnxruntime its "
        f"vectors differ from the model's by {difference:.1e} at most"
    )


def check(args: argparse.Namespace) -> Path:
    """The folder to write. Raises ValueError for what can be refused without loading the model."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"bge_ds.export needs {', '.join(missing)}; install it with `pip install bge_ds[onnx]`")
    if args.output is None and not Path(args.model_name_or_path).is_dir():
        raise ValueError(f"--model_name_or_path {args.model_name_or_path} is no folder here: give --output for the ONNX file")
    output = args.output or Path(args.model_name_or_path) / FOLDER
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder")
    if (output / "model.onnx").exists() and not args.overwrite:
        raise ValueError(f"--output {output} has a model.onnx: name another folder, or give --overwrite")
    return output


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 2 after a one-line message about a mistake of the user."""
    args = parser().parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
