"""The weighted average of models: `python -m bge_ds.merge --models A B --weights 0.6 0.4 --output FOLDER`.

LM-Cocktail (arXiv:2311.13534): a fine-tuned model averaged with its base gets back what it forgot, and models fine-tuned on
several tasks become one. Weights are given, equal, or found from the losses on a few examples. The models must be of one shape
with one tokenizer and one pooling; everything is compared before anything is computed.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

from bge_ds import __version__
from bge_ds.config.parser import exit_status, positive_int
from bge_ds.config.validation import check_license
from bge_ds.evaluation import DEFAULT_LENGTHS

if typing.TYPE_CHECKING:
    from bge_ds.merging.model_files import ModelFiles

NOTE = "merge.json"
DTYPES = ("fp32", "bf16", "fp16")
TEMPERATURE, SIMILARITY_TEMPERATURE = 5.0, 0.02  # LM-Cocktail's; that of bge_ds.finetune
_OF_EXAMPLES = ("temperature", "similarity_temperature", "batch_size", "use_cpu", "bf16", *DEFAULT_LENGTHS)


@dataclass(frozen=True)
class Options:
    """What is merged, how, into what; the flags of the command, see `--help`. None: the default, or no effect."""

    models: list[str]
    output: Path
    weights: list[float] | None = None
    examples: Path | None = None
    temperature: float | None = None
    similarity_temperature: float | None = None
    query_max_len: int | None = None
    passage_max_len: int | None = None
    batch_size: int | None = None
    use_cpu: bool | None = None
    bf16: bool | None = None
    dtype: str = "fp32"
    license: str | None = None
    overwrite: bool = False
    cache_dir: str | None = None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bge_ds.merge", description=__doc__.split("\n")[0].split(": ")[0])
    add = p.add_argument
    add("--models", required=True, nargs="+", metavar="MODEL",
        help="folders or hub names of two or more models; all but the weights is the first one's")  # fmt: skip
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder to write; it appears when all is done")
    add("--weights", nargs="+", type=float, metavar="X", help="of each model; they must sum to 1 (default: equal weights)")
    add("--examples", type=Path, metavar="FILE",
        help="JSON lines of groups, as for bge_ds.finetune: weights are the softmax of -loss / temperature")  # fmt: skip
    add("--temperature", type=float, help=f"with --examples: a lower one favours the best model ({TEMPERATURE:g})")
    add("--similarity_temperature", type=float,
        help=f"with --examples: similarities are divided by it in the loss ({SIMILARITY_TEMPERATURE:g})")  # fmt: skip
    for name, default in DEFAULT_LENGTHS.items():
        add(f"--{name}", type=positive_int, help=f"with --examples: tokens, special tokens included ({default})")
    add("--batch_size", type=positive_int, help="with --examples: full-length texts a batch (64)")
    add("--use_cpu", action="store_true", default=None, help="with --examples: even where there is a GPU")
    add("--bf16", action="store_true", default=None, help="with --examples: matrix products in bf16")
    add("--dtype", choices=DTYPES, default="fp32", help="of the weights written; sums are in fp32")
    add("--license", help="licence of the result for its card, by the hub's name, such as apache-2.0")
    add("--overwrite", action="store_true", help="replace --output where it is the result of an earlier merge")
    add("--cache_dir", help="where models fetched from the hub are kept")
    return p


def check(args: Options) -> None:
    """Refuse what the flags alone make wrong. Raises ValueError."""
    count, weights = len(args.models), args.weights
    if count < 2:
        raise ValueError("--models names one model; give two or more")
    if twice := sorted({model for model in args.models if args.models.count(model) > 1}):
        raise ValueError(f"--models names {', '.join(twice)} twice; give each once, with the sum of its weights")
    if weights is not None and args.examples is not None:
        raise ValueError("--weights and --examples exclude each other: weights are given or found; drop one of them")
    if args.examples is None and (vain := [name for name in _OF_EXAMPLES if getattr(args, name) is not None]):
        raise ValueError(f"--{vain[0]} has no effect without --examples; add that or drop --{vain[0]}")
    for name in ("temperature", "similarity_temperature"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value:g} is not a number above 0")
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype} is none of {', '.join(DTYPES)}")
    if weights is not None:
        _check_weights(weights, count)
    check_license(args.license)
    _check_output(args)


def _check_weights(weights: list[float], count: int) -> None:
    if len(weights) != count:
        raise ValueError(f"--weights has {len(weights)} numbers for {count} models; give one for each")
    if wrong := [weight for weight in weights if not 0 < weight < math.inf]:
        raise ValueError(f"--weights {wrong[0]:g} is not a number above 0; leave out a model that is not to count")
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        shares = " ".join(f"{weight / total:.7g}" for weight in weights)
        raise ValueError(f"--weights sum to {total:.7g}, not to 1; in these proportions they are {shares}")


def _check_output(args: Options) -> None:
    output = args.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder")
    inside = [model for model in args.models if output.resolve() in (Path(model).resolve(), *Path(model).resolve().parents)]
    if inside:
        raise ValueError(f"--output {output} holds {inside[0]}, which is read; name another folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / NOTE).is_file():
            raise ValueError(f"--output {output} is not empty, and no result of an earlier merge; name another folder")
        if not args.overwrite:
            raise ValueError(f"--output {output} holds an earlier result; name another folder, or give --overwrite")


def find_weights(args: Options, models: list[ModelFiles]) -> tuple[list[float], dict]:
    """(weight of each model, what the note says of where they come from). One model at a time is in memory."""
    if args.weights is not None:
        total = math.fsum(args.weights)
        return [weight / total for weight in args.weights], {"weights_from": "flags"}
    if args.examples is None:
        return [1 / len(models)] * len(models), {"weights_from": "equal"}
    from bge_ds.data.files import hash_file
    from bge_ds.evaluation.embedder import Embedder
    from bge_ds.merging import example_losses

    temperature = args.temperature or TEMPERATURE
    similarity = args.similarity_temperature or SIMILARITY_TEMPERATURE
    groups = example_losses.read_groups(args.examples)
    how = {"batch_size": args.batch_size or 64, "use_cpu": bool(args.use_cpu), "bf16": bool(args.bf16)}
    how |= {name: getattr(args, name) for name in DEFAULT_LENGTHS}
    losses = [example_losses.loss_of(Embedder.load(model.folder, **how), groups, similarity) for model in models]
    if not all(map(math.isfinite, losses)):
        bad = next(model.name for model, loss in zip(models, losses, strict=True) if not math.isfinite(loss))
        raise ValueError(f"the loss of {bad} on {args.examples} is not finite; leave this model out")
    origin = {"file": args.examples.name, "xxh3_128": hash_file(args.examples), "groups": len(groups), "losses": losses}
    origin |= {"temperature": temperature, "similarity_temperature": similarity}
    return example_losses.weights_of(losses, temperature), {"weights_from": "loss on examples", "examples": origin}


def run(args: Options) -> None:
    """Compare, weigh, average, check, and put the result in its place. Raises ValueError for what the user can fix."""
    check(args)
    from bge_ds.merging import example_losses, model_files

    if args.examples is not None:
        example_losses.read_groups(args.examples)  # a mistake in it is found before a hub model is fetched
    models = [model_files.open_model(name, args.cache_dir) for name in args.models]
    for note in model_files.check_alike(models):
        print(f"note: {note}", file=sys.stderr)
    for model in models:
        if model.left_out:
            more = f" and {len(model.left_out) - 1} more" if len(model.left_out) > 1 else ""
            print(
                f"note: left out of {model.name}, as an encoder has no place for it: {model.left_out[0]}{more}", file=sys.stderr
            )
    weights, origin = find_weights(args, models)
    for k, (model, weight) in enumerate(zip(models, weights, strict=True)):
        loss = f", loss {origin['examples']['losses'][k]:.4f}" if "examples" in origin else ""
        print(f"{weight:.4f}  {model.name}{loss}")
    write(args, models, weights, origin)
    print(f"wrote {args.output}")


def write(args: Options, models: list[ModelFiles], weights: list[float], origin: dict) -> None:
    """The result beside its place, loaded once, then moved. Raises ValueError where it cannot be written."""
    from safetensors import SafetensorError

    from bge_ds.checkpoint import filesystem
    from bge_ds.data.files import hash_file
    from bge_ds.data.preprocess import validate
    from bge_ds.merging import average
    from bge_ds.modeling import model_card

    mixed = [
        {"name": model.name, "weight": weight, "left_out": model.left_out,
         "xxh3_128": {str(path.relative_to(model.folder)): hash_file(path) for path in model.weight_files}}
        for model, weight in zip(models, weights, strict=True)
    ]  # fmt: skip
    note = {"bge_ds": __version__, **origin, "dtype": args.dtype, "models": mixed}
    partial = args.output.with_name(args.output.name + filesystem.PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        average.write_model(models, weights, partial, args.dtype)
        filesystem.write_json(partial / NOTE, note)
        (partial / model_card.FILE).write_text(card(args, models, weights, origin), encoding="utf-8")
        average.check_loads(partial, validate.load_tokenizer(partial))
        filesystem.sync(partial)
        filesystem.replace_folder(partial, args.output)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--output {args.output} could not be written ({error}); make room, or name another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def card(args: Options, models: list[ModelFiles], weights: list[float], origin: dict) -> str:
    """The model card of the result."""
    from bge_ds.evaluation.embedder import PROMPTS, read_prompts
    from bge_ds.modeling import model_card
    from bge_ds.modeling.encoder import longest_text, read_pooling

    first = models[0]
    names = [model_card.shown_name(model.name) for model in models]
    pooling, normalize = read_pooling(first.folder) or (None, False)
    head, columns = ["model", "weight"], [names, [f"{weight:.4f}" for weight in weights]]
    if "examples" in origin:
        head.append("loss on examples")
        columns.append([f"{loss:.4f}" for loss in origin["examples"]["losses"]])
    rows = zip(*columns, strict=True)
    length = longest_text(first.config)
    return model_card.page(
        model_card.front_matter([model.name for model in models], args.license, "merge", "embedder" if pooling else "encoder"),
        f"{names[0]}, mixed with {', '.join(names[1:])}",
        "A weighted average of text embedding models (LM-Cocktail, arXiv:2311.13534). "
        + model_card.describe(first.config.hidden_size, length, pooling, normalize),
        [
            ("Use", model_card.usage(model_card.PLACE, pooling, normalize, read_prompts(first.folder / PROMPTS), length)),
            ("Mixed from", f"{model_card.table(head, rows)}\n\n`{NOTE}` has the exact weights and the hashes of the files."),
        ],
    )


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 2 after a one-line message about a mistake of the user."""
    args = parser().parse_args(argv)
    return exit_status(lambda: run(Options(**vars(args))))


if __name__ == "__main__":
    sys.exit(main())
