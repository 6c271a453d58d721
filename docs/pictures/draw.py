"""Draws the pictures of the README and of the site, as SVG files beside this script: `python docs/pictures/draw.py`.

Each picture adapts to a light or dark page (`prefers-color-scheme`). Text is inside filled boxes, or in a grey that can be
read on white and on black, so that it stays readable where a page and the reader's system disagree.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
WIDTH = 960
LINE = 17  # pixels from one line of text to the next
GREY = "#6e7781"

STYLE = f"""
text {{ font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }}
.title {{ font-weight: 600; }}
.code {{ font: 600 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
.small {{ font-size: 12px; }}
.label {{ font-size: 12px; fill: {GREY}; }}
.stage {{ font-size: 12px; font-weight: 600; fill: {GREY}; letter-spacing: .04em; }}
.box {{ fill: #f6f8fa; stroke: #d0d7de; }}
.work {{ fill: #ddf4ff; stroke: #54aeff; }}
.result {{ fill: #dafbe1; stroke: #4ac26b; }}
.ranks {{ fill: #fff8c5; stroke: #d4a72c; }}
.frame {{ fill: none; stroke: {GREY}; stroke-dasharray: 5 4; }}
.arrow {{ fill: none; stroke: {GREY}; stroke-width: 1.5; }}
.head {{ fill: {GREY}; }}
@media (prefers-color-scheme: dark) {{
  text {{ fill: #e6edf3; }}
  .label, .stage {{ fill: #9198a1; }}
  .box {{ fill: #161b22; stroke: #3d444d; }}
  .work {{ fill: #0c2745; stroke: #1f6feb; }}
  .result {{ fill: #0f2e1a; stroke: #2ea043; }}
  .ranks {{ fill: #332a0b; stroke: #9e6a03; }}
  .frame, .arrow {{ stroke: #9198a1; }}
  .head {{ fill: #9198a1; }}
}}
"""


class Picture:
    """Elements of one SVG file, in the order in which they are drawn; coordinates are pixels from the top left."""

    def __init__(self, height: int, description: str):
        self.height, self.description = height, description
        self.elements: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        self.elements.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>')

    def frame(self, x: float, y: float, width: float, height: float, kind: str = "frame") -> None:
        self.elements.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"/>')

    def box(self, x: float, y: float, width: float, height: float, title: str, lines: list[str], kind: str = "box") -> None:
        """A filled box with centred text. A title that begins with `*` is plain words, any other is code."""
        self.frame(x, y, width, height, kind)
        first = y + height / 2 - LINE * len(lines) / 2 + 4.5
        self.text(x + width / 2, first, title.lstrip("*"), "title" if title.startswith("*") else "code", "middle")
        for number, words in enumerate(lines, 1):
            self.text(x + width / 2, first + number * LINE, words, "small", "middle")

    def arrow(self, *corners: tuple[float, float]) -> None:
        """A line through the corners, along the axes, with a head at its end."""
        *rest, (before_x, before_y), (x, y) = corners
        dx, dy = (x > before_x) - (x < before_x), (y > before_y) - (y < before_y)
        line = [*rest, (before_x, before_y), (x - 7 * dx, y - 7 * dy)]
        points = " ".join(f"{px:g},{py:g}" for px, py in line)
        wings = [(x, y), (x - 9 * dx - 4.5 * dy, y - 9 * dy - 4.5 * dx), (x - 9 * dx + 4.5 * dy, y - 9 * dy + 4.5 * dx)]
        head = " ".join(f"{px:g},{py:g}" for px, py in wings)
        self.elements += [f'<polyline class="arrow" points="{points}"/>', f'<polygon class="head" points="{head}"/>']

    def row(self, y: float, width: float, stages: list[tuple[str, list[str], str]], back: bool = False) -> list[float]:
        """Boxes (title, lines, kind) over the whole width, arrows between them (`back`: to the left); their middles."""
        gap = (WIDTH - 16 - width * len(stages)) / (len(stages) - 1)
        for number, (title, lines, kind) in enumerate(stages):
            x = 8 + number * (width + gap)
            self.box(x, y, width, 92, title, lines, kind)
            if number:
                ends = [(x - gap, y + 46), (x, y + 46)]
                self.arrow(*(reversed(ends) if back else ends))
        return [8 + number * (width + gap) + width / 2 for number in range(len(stages))]

    def svg(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self.description)}">'
        return "\n".join([head, f"<style>{STYLE}</style>", *self.elements, "</svg>\n"])


def pipeline() -> Picture:
    """From data to a model: the commands, what each takes and what it makes."""
    picture = Picture(
        502, "Data becomes shards; pre-training, fine-tuning and reranker training make models of them; mining and scoring "
        "with these models give the groups of the next round"
    )  # fmt: skip
    upper, lower, third, high = 48, 172, 296, 84
    data, work, shards, train, result = 8, 200, 366, 530, 786
    picture.frame(train - 14, 8, 242, third + high + 36 - 8)
    picture.text(train + 107, 31, "one GPU to many hosts", "stage", "middle")
    picture.box(work, upper, 144, lower + high - upper, "bge_ds.preprocess", ["tokenizes once"], "work")
    vocabulary_head, libraries = ["encoder with its", "vocabulary head"], ["for transformers and", "sentence-transformers"]
    rows = (
        (upper, '{"text"}', "bge_ds.pretrain", "RetroMAE, DupMAE, MLM", "encoder_model/", vocabulary_head),
        (lower, '{"query","pos","neg"}', "bge_ds.finetune", "contrastive, GradCache", "*embedding model", libraries),
        (third, None, "bge_ds.rerank", "cross-encoders, decoders", "*reranker", ["for transformers and", "CrossEncoder"]),
    )
    for y, fields, name, does, made, described in rows:
        middle = y + high / 2
        if fields:
            picture.box(data, y, 170, high, fields, ["JSON lines, Parquet,", "Arrow, hub datasets"])
            picture.arrow((data + 170, middle), (work, middle))
            picture.arrow((work + 144, middle), (shards, middle))
            picture.box(shards, y, 128, high, "*Arrow shards", ["hashed, read from", "a memory map"])
            picture.arrow((shards + 128, middle), (train, middle))
        else:
            picture.arrow((shards + 64, lower + high), (shards + 64, middle), (train, middle))
        picture.box(train, y, 214, high, name, [does, "no padding, ZeRO 0 to 3"], "work")
        picture.arrow((train + 214, middle), (result, middle))
        picture.box(result, y, 166, high, made, described, "result")
    turn = (upper + high + lower) / 2
    picture.arrow((result + 83, upper + high), (result + 83, turn), (train + 107, turn), (train + 107, lower))
    picture.text(train + 107, third + high + 23, "checkpoint-N/ at any step", "label", "middle")
    again = ["new negatives by the model,", "a reranker's scores: the next round"]
    picture.box(data, third, 336, high, "bge_ds.mine, bge_ds.score", again, "work")
    picture.arrow((data + 85, third), (data + 85, lower + high))
    below, bottom = third + high + 54, third + high + 70
    picture.arrow((result + 40, third + high), (result + 40, below), (data + 168, below), (data + 168, third + high))
    picture.arrow((result + 83, third + high), (result + 83, bottom))
    around = (
        ("bge_ds.doctor", "checks every host"), ("launch/supervise.sh", "resumes after a failure"),
        ("bge_ds.merge", "averages models"), ("bge_ds.encode", "a corpus to vectors"), ("bge_ds.evaluate", "nDCG, MRR, recall"),
    )  # fmt: skip
    for number, (name, does) in enumerate(around):
        picture.box(8 + 192 * number, bottom, 176, 48, name, [does], "work")
    return picture


def line_to_loss() -> Picture:
    """Journey 1: what happens once, when shards are made, and what happens in every step."""
    picture = Picture(364, "A line is checked, tokenized and stored in a shard; a step packs its rows and computes a loss")
    picture.text(8, 18, "ONCE: bge_ds.preprocess", "stage")
    middles = picture.row(28, 166, [
        ("input_files.py", ["finds the files, cuts", "them into segments"], "box"),
        ("validate.py", ["checks a line; errors", "name file and line"], "box"),
        ("tokenize.py", ["token ids, and words", "for masking"], "box"),
        ("segment_writer.py", ["writes each passage", "of a segment once"], "box"),
        ("merge.py", ["manifest with the", "hash of every shard"], "box"),
    ])  # fmt: skip
    picture.arrow((middles[-1], 120), (middles[-1], 152))
    picture.box(8, 152, WIDTH - 16, 48, "*shards on disk", ["Arrow streams and manifest.json"], "result")
    picture.text(8, 246, "EVERY TRAINING STEP", "stage")
    middles = picture.row(258, 138, [
        ("sampler.py", ["(seed, epoch, step)", "-> rows"], "box"),
        ("shard_reader.py", ["memory-mapped", "rows"], "box"),
        ("collate.py", ["one packed row:", "ids_T, cu_seqlens"], "box"),
        ("dataloader.py", ["worker processes,", "pinned memory"], "box"),
        ("encoder.py", ["packed forward:", "hidden_TD, emb_ND"], "work"),
        ("*loss", ["contrastive.py or", "retromae.py"], "work"),
    ])  # fmt: skip
    picture.arrow((middles[1], 200), (middles[1], 258))
    return picture


def embedding_to_gradient() -> Picture:
    """Journey 2: the forward passes of a fine-tuning step, and how gradients come back."""
    picture = Picture(352, "Pieces are embedded, vectors gathered, the loss gives them gradients, pieces are computed again")
    picture.text(8, 18, "FORWARD", "stage")
    forward = picture.row(44, 166, [
        ("encoder.py", ["packed forward", "of piece k"], "work"),
        ("encoder.pool", ["one fp32 vector a", "text, normalised"], "work"),
        ("all_gather_rows", ["p_PD of all ranks,", "q_BD of this one"], "ranks"),
        ("linear_logsumexp", ["over other passages,", "no matrix of scores"], "work"),
        ("contrastive.loss", ["own group's scores,", "mean over queries"], "work"),
    ])  # fmt: skip
    left, width = forward[1] - 83, forward[1] + 83
    picture.frame(0.5, 28, width + 8, 130)
    picture.text((width + 8) / 2, 152, "every piece; only the last one keeps its graph", "label", "middle")
    picture.text(8, 192, "BACKWARD", "stage")
    picture.row(218, 166, [
        ("engine", ["one reduction over the", "ranks, optimizer step"], "ranks"),
        ("encoder again", ["piece k with its graph:", "sum(emb_nD * grad_nD)"], "work"),
        ("grad_cache", ["grad_ND is cut", "into the pieces"], "box"),
        ("gather, backward", ["a row's gradients,", "summed over ranks"], "ranks"),
        ("loss.backward()", ["the gradient of", "each vector"], "work"),
    ], back=True)  # fmt: skip
    picture.frame(left - 8, 202, 182, 130)
    picture.text(forward[1], 326, "every piece", "label", "middle")
    picture.arrow((forward[-1], 136), (forward[-1], 218))
    picture.frame(WIDTH - 222, 326, 14, 14, "ranks")
    picture.text(WIDTH - 202, 338, "ranks communicate", "label")
    return picture


PICTURES = {"pipeline.svg": pipeline, "line_to_loss.svg": line_to_loss, "embedding_to_gradient.svg": embedding_to_gradient}


def main() -> None:
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
