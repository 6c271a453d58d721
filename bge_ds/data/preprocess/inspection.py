"""What a folder of shards holds: counts, exact quantiles of lengths, samples decoded, and a picture of the lengths.

Lengths come from the offsets of the list columns: no token is read, and memory holds one number for each length that
occurs, whatever the number of rows.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bge_ds.data import diagnosis
from bge_ds.data.preprocess import validate
from bge_ds.data.preprocess.instructions import PLAIN
from bge_ds.data.preprocess.workers import SETTINGS
from bge_ds.data.shards import shard_reader
from bge_ds.data.shards.manifest_file import TABLES, Manifest

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
PICTURES = (".png", ".svg")
# (table, column) -> what it counts and the setting of the manifest that bounds it, if one does.
COLUMNS = {
    ("texts", "ids"): ("tokens of a text", "max_seq_length"),
    ("groups", "query"): ("tokens of a query", "query_max_len"),
    ("passages", "ids"): ("tokens of a passage", "passage_max_len"),
    ("groups", "pos"): ("positives of a group", None),
    ("groups", "neg"): ("negatives of a group", None),
}


def inspect(folder: Path, sample: int = 3, histogram: Path | None = None, say: Callable[[str], None] = print) -> None:
    """Prints what a folder of shards holds, and `sample` rows of it, evenly spread, decoded.

    histogram: a .png or .svg file to draw the lengths into. Raises ValueError for a folder that cannot be read, another
    ending, or where matplotlib is missing."""
    if histogram is not None:
        check_picture(histogram)
    data = shard_reader.open_folder(folder)
    manifest, kind = data.manifest, data.manifest.kind
    made = manifest.tokenizer
    say(f"{folder}: {kind} shards, schema version {manifest.schema_version}, by bge_ds {manifest.bge_ds_version}")
    say(f"tokenizer    {made.name}, {made.vocab_size:,} ids, fingerprint {made.fingerprint}")
    for name in SETTINGS[kind]:
        if (value := getattr(manifest, name)) not in (None, PLAIN, False):
            say(f"{name}  {value!r}")
    say("counts       " + ", ".join(f"{value:,} {name}" for name, value in manifest.counts.items()))
    for line in shares(manifest):
        say(line)
    for source in manifest.sources:
        say(f"source       {source.path}: rows {source.rows[0]:,} to {source.rows[1]:,}")
    for table in TABLES[kind]:
        entries = [entry for entry in manifest.shards if entry.table == table]
        size = sum(entry.bytes for entry in entries) / (1 << 20)
        say(f"{table:<12} {sum(entry.rows for entry in entries):,} rows in {len(entries)} shards, {size:,.1f} MiB")
    say(f"fingerprint  {data.fingerprint}")
    counted = {key: data.length_counts(*key) for key in COLUMNS if key[0] in TABLES[kind]}
    for line in length_table(counted):
        say(line)
    for finding in diagnosis.of_shards(data):
        say(f"warning      {finding}")
    if histogram is not None:
        draw(histogram, counted, manifest)
        say(f"histogram    {histogram}")
    try:
        tokenizer = validate.load_tokenizer(made.name)
    except ValueError as error:
        say(f"samples are shown as ids: {error}")
        tokenizer = None
    for row in np.linspace(0, len(data) - 1, min(sample, len(data)), dtype=int).tolist():
        _show(data, row, tokenizer, say)


def shares(manifest: Manifest) -> list[str]:
    """Lines about how much was cut, and how often a passage is named."""
    counts = manifest.counts
    texts = counts["texts"] if manifest.kind == "pretrain" else counts["groups"] + counts["passages"]
    lines = [f"cut          {counts['cut_texts']:,} of {texts:,} texts ({counts['cut_texts'] / texts:.2%})"]
    if "cut_tokens" in counts:
        lines[0] += f", {counts['cut_tokens'] / max(1, counts['tokens'] + counts['cut_tokens']):.2%} of the tokens"
    if "duplicates" in counts:
        stored, named = counts["passages"], counts["passages"] + counts["duplicates"]
        lines.append(f"duplicates   {named:,} passages named, {stored:,} stored: {stored / named:.3f} of them")
    return lines


# ------------------------------------------------------------------------------------------------------------ lengths


def quantile(counts_L: np.ndarray, share: float) -> int:
    """The least length that at least `share` of the rows do not exceed; counts_L[n] rows have length n."""
    return int(np.searchsorted(np.cumsum(counts_L), max(1, np.ceil(share * counts_L.sum()))))


def length_table(counted: dict[tuple[str, str], np.ndarray]) -> list[str]:
    """Least, quantiles, most and mean of each column, one line each under a heading."""
    names = ["least", *(f"{share:.0%}" for share in QUANTILES), "most", "mean"]
    lines = [f"{'lengths':<22}" + "".join(f"{name:>8}" for name in names)]
    for key, counts_L in counted.items():
        if not counts_L.sum():
            continue
        mean = counts_L @ np.arange(len(counts_L)) / counts_L.sum()
        values = [quantile(counts_L, share) for share in (0, *QUANTILES, 1)]
        lines.append(f"{COLUMNS[key][0]:<22}" + "".join(f"{value:>8,}" for value in values) + f"{mean:>8,.1f}")
    return lines


# ------------------------------------------------------------------------------------------------------------ picture


def check_picture(path: Path) -> None:
    """Raises ValueError where a picture of this name cannot be drawn."""
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"--histogram {path}: give a file that ends in {' or '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--histogram needs matplotlib, which is not installed: pip install matplotlib (or bge_ds with [plots])"
        ) from None


def draw(path: Path, counted: dict[tuple[str, str], np.ndarray], manifest: Manifest) -> None:
    """A panel for each column: how many rows have which length, the median, the 95 % quantile and the length it is cut to."""
    from matplotlib.figure import Figure

    panels = [(key, counts_L) for key, counts_L in counted.items() if counts_L.sum()]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 0.5 + 3.4 * lines), dpi=130, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (key, counts_L) in zip(axes, panels, strict=False):
        title, bound = COLUMNS[key]
        _panel(axis, counts_L, title, getattr(manifest, bound) if bound else None)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    counts = manifest.counts
    rows = "texts" if manifest.kind == "pretrain" else "groups"
    figure.suptitle(f"{counts[rows]:,} {rows}, {counts['tokens']:,} tokens", fontsize=12, fontweight="bold")
    figure.savefig(path)


def _panel(axis: Any, counts_L: np.ndarray, title: str, bound: int | None) -> None:
    least, most = int(np.flatnonzero(counts_L)[0]), len(counts_L) - 1
    width = max(1, -(-(most - least + 1) // 64))  # lengths a bar, so that bars stay wide enough to see
    edges = np.arange(least, most + width + 1, width)
    full = int(counts_L[bound]) if bound and bound == most else 0
    below_L = counts_L.copy()
    below_L[most] -= full
    bars, _ = np.histogram(np.arange(len(below_L)), edges, weights=below_L)
    axis.bar(edges[:-1] - 0.5, bars, width, align="edge", color="#4c78a8", edgecolor="white", linewidth=0.4)
    # Rows at the limit, most of them cut, would dwarf all others: their bar may leave the panel, its label tells its height.
    top = 1.12 * max(bars.max(), min(full, 1.3 * bars.max()) if bars.max() else full)
    if full:
        label = f"at the limit of {bound:,}: {full:,} rows, {full / counts_L.sum():.1%}"
        axis.bar(most - 0.5, full, max(width, 1), align="edge", color="#f2a541", edgecolor="white", linewidth=0.4, label=label)
    for share, style, name in ((0.5, "-", "median"), (0.95, "--", "95 %")):
        at = quantile(counts_L, share)
        axis.axvline(at, color="#d1495b", linestyle=style, linewidth=1.5, label=f"{name}: {at:,}")
    axis.set(xlim=(least - 0.5 - width / 2, most + 0.5 + width), ylim=(0, top))
    axis.set_title(title, fontsize=11)
    axis.set_ylabel("rows" if width == 1 else f"rows, {width} lengths a bar")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for each in (axis.xaxis, axis.yaxis):
        each.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="best")


# ------------------------------------------------------------------------------------------------------------ samples


def _show(data: Any, row: int, tokenizer: Any, say: Callable[[str], None]) -> None:
    def text(ids: np.ndarray) -> str:
        shown = tokenizer.decode(ids.tolist()) if tokenizer else " ".join(map(str, ids.tolist()))
        return f"({len(ids)} tokens) " + (shown if len(shown) <= 240 else shown[:240] + "...")

    say(f"--- row {row}")
    if isinstance(data, shard_reader.PretrainShards):
        ids, words = data.ids(row), data.words(row)
        say(f"text  {text(ids)}")
        pieces = tokenizer.convert_ids_to_tokens(ids[:40].tolist()) if tokenizer else list(map(str, ids[:40].tolist()))
        known = itertools.groupby(zip(words, pieces, strict=False), key=lambda pair: pair[0])
        say(f"words ({words[-1] + 1}) " + " ".join("+".join(piece for _, piece in word) for _, word in known))
        return
    group, (kind, prompt) = data.group(row), data.notes(row)
    say(f"query {text(group.query)}" + (f" type {kind!r}" if kind else "") + (f" prompt {prompt!r}" if prompt else ""))
    for name, rows, scores in (("pos", group.pos, group.pos_scores), ("neg", group.neg, group.neg_scores)):
        for i, passage in enumerate(rows[:3].tolist()):
            score = "" if scores is None else f" score {scores[i]:g}"
            say(f"{name}   passage {passage}{score} {text(data.passage(passage))}")
        if len(rows) > 3:
            say(f"{name}   and {len(rows) - 3} more")
