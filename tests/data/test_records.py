"""Lines and tokens: bad lines are named, ids are the tokenizer's own, words are words for every kind of it."""

from __future__ import annotations

import gzip
import json

import helpers
import numpy as np
import orjson
import pytest
from transformers import AutoTokenizer

from bge_ds.data import records

LONG = "retrieval models embed questions and passages into one vector space, " * 40


@pytest.fixture(scope="module", params=["wordpiece", "bytes", "unigram"])
def tokenizer(request, tmp_path_factory):
    folder = helpers.make_tokenizer(request.param, tmp_path_factory.mktemp(request.param))
    return records.load_tokenizer(folder)


def pieces_by_word(tokenizer, text: str, length: int = 512) -> list[list[str]]:
    """The tokens of a text, those of one word together, special tokens left out."""
    core = records.core(tokenizer)
    (ids,), (words,), _ = records.Encoder(core).ids_and_words([text], length)
    assert len(ids) == len(words)
    groups: dict[int, list[str]] = {}
    for token, word in zip(tokenizer.convert_ids_to_tokens(ids), words.tolist(), strict=True):
        groups.setdefault(word, []).append(token)
    found = list(groups.values())
    assert sorted(groups) == list(range(len(found))), "word numbers have gaps"
    assert (np.diff(words) >= 0).all()
    head, tail = len(core.prefix_ids), len(core.suffix_ids)
    assert all(len(word) == 1 for word in [*found[:head], *found[len(found) - tail :]])
    return found[head : len(found) - tail]


def plain(words: list[list[str]]) -> list[str]:
    """Words as text, the marks of sub-words and spaces taken off."""
    return ["".join(word).replace("##", "").replace("Ġ", "").replace("▁", "") for word in words]


# ---------------------------------------------------------------------------------------------------------------- ids


def test_baked_in_truncation_and_padding_change_nothing(minilm_path):
    """all-MiniLM's tokenizer.json cuts and pads to 128: a text of 300 tokens must keep them, a short one gain none."""
    raw = AutoTokenizer.from_pretrained(minilm_path)
    assert raw.backend_tokenizer.truncation["max_length"] == 128 and raw.backend_tokenizer.padding["length"] == 128
    for tokenizer in (raw, records.load_tokenizer(minilm_path)):
        (long, short), cuts = records.Encoder(records.core(tokenizer)).ids([LONG, "hi"], 300)
        assert (len(long), len(short), cuts) == (300, 3, [True, False])
        assert long[0] == short[0] == 101 and long[-1] == short[-1] == 102
    assert raw.backend_tokenizer.truncation is not None, "core() changed a tokenizer that it was lent"


def test_ids_are_those_of_the_tokenizer_cut_before_its_last_special(tokenizer):
    """Rows equal what transformers itself gives with truncation, so training and serving see the same inputs."""
    encoder = records.Encoder(records.core(tokenizer))
    texts = [*helpers.SENTENCES, LONG, "a", "北京 hello <mask> [MASK]"]
    for length in (3, 16, 64, 2048):
        wanted = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        rows, _ = encoder.ids(texts, length)
        assert rows == wanted
        with_words, words, _ = encoder.ids_and_words(texts, length)
        assert with_words == wanted and [len(w) for w in words] == [len(row) for row in wanted]


def test_instruction_is_a_plain_prefix(tokenizer):
    """No separator is added: ids are those of the two strings put together, specials inside the length."""
    rows, cuts = records.Encoder(records.core(tokenizer)).ids(["fox jumps", LONG], 20, "question: ")
    assert rows[0] == tokenizer("question: fox jumps")["input_ids"] and cuts == [False, True]
    assert rows[1] == tokenizer("question: " + LONG, truncation=True, max_length=20)["input_ids"]


@pytest.mark.parametrize("text", ["\u200b\u200d", "[SEP] [PAD]"])
@pytest.mark.parametrize("prefix", ["", "query: "])
def test_a_text_without_a_token_of_its_own_is_empty(minilm_path, text, prefix):
    """Zero-width characters and special tokens say nothing; an instruction before them must not hide that."""
    encoder = records.Encoder(records.core(records.load_tokenizer(minilm_path)))
    rows, _ = encoder.ids([text, "fine", "!", "中"], 16, prefix)
    assert rows[0] == [] and all(rows[1:])


def test_lengths_without_room_are_refused(tokenizer):
    """A length that the specials and the instruction fill would train on the instruction alone."""
    encoder = records.Encoder(records.core(tokenizer))
    encoder.check_room(3, "query_max_len")
    with pytest.raises(ValueError, match=r"query_max_len 2 leaves no room for text: special tokens take 2 .* give 3"):
        encoder.check_room(2, "query_max_len")
    with pytest.raises(ValueError, match="query_max_len 4 leaves no room for text: special tokens and instruction"):
        encoder.check_room(4, "query_max_len", "the quick brown fox")


# ------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_survives_saving_and_calling(tokenizer, tmp_path):
    """Shards made with the base model's tokenizer serve the model trained from it, which saved the tokenizer again."""
    before = records.fingerprint(tokenizer)
    tokenizer(["a b c"], truncation=True, max_length=4, padding="max_length")
    assert records.fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert records.fingerprint(records.load_tokenizer(tmp_path)) == before


def test_fingerprint_tells_tokenizers_apart(tokenizer, minilm_path):
    """One more token, another normaliser: the ids differ, so the fingerprint must."""
    known = records.fingerprint(tokenizer)
    assert known != records.fingerprint(records.load_tokenizer(minilm_path))
    parts = orjson.loads(tokenizer.backend_tokenizer.to_str())
    parts["normalizer"] = {"type": "Lowercase"}
    other = type(tokenizer)(tokenizer_object=records.Tokenizer.from_str(orjson.dumps(parts).decode()))
    assert records.fingerprint(other) != known


def test_slow_and_absent_tokenizers_are_refused(tmp_path, monkeypatch):
    """A slow tokenizer knows no word ids: saying so is better than whole words that silently become tokens."""
    with pytest.raises(ValueError, match=r"tokenizer .*nowhere cannot be loaded: .*give a folder or a hub name"):
        records.load_tokenizer(tmp_path / "nowhere")

    class Slow:
        is_fast = False

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Slow())
    with pytest.raises(ValueError, match="tokenizer x: Slow has no fast version"):
        records.load_tokenizer("x")


# -------------------------------------------------------------------------------------------------------------- words


def test_sub_words_of_a_word_share_its_number(tokenizer):
    """Whole-word masking needs `un believ able` to be one word, and `fox jumps` to be two, for each kind."""
    words = pieces_by_word(tokenizer, "quick antidisestablishments of unbelievability")
    assert plain(words) == ["quick", "antidisestablishments", "of", "unbelievability"]
    assert max(len(word) for word in words) > 2, "nothing was cut into sub-words: this proves nothing"


def test_a_chinese_character_is_a_word(tokenizer):
    """Chinese has no spaces: a whole sentence must not become one word, nor bytes of a character several words."""
    words = pieces_by_word(tokenizer, "的 quick北京是 fox")
    shown = plain(words)
    assert len(words) == 6 and shown[1] == "quick" and shown[-1] == "fox"


def test_chinese_sentences_part_at_every_character_boundary_between_tokens(minilm_path):
    """WordPiece gives a token to each character: as many words as characters, punctuation included."""
    tokenizer = records.load_tokenizer(minilm_path)
    assert len(pieces_by_word(tokenizer, "北京是中国的首都，人口很多。")) == 14


def test_bytes_of_one_character_stay_together(tmp_path):
    """Byte-level BPE may cut a character into three tokens: hiding one of them alone would hide nothing."""
    tokenizer = records.load_tokenizer(helpers.make_tokenizer("bytes", tmp_path))
    words = pieces_by_word(tokenizer, "龘龘x")
    assert [len(word) for word in words] == [3, 3, 1]


def test_spaces_part_words_where_the_tokenizer_has_no_pre_tokenizer(tmp_path):
    """Some SentencePiece conversions call the whole text one piece; then white space tells the words."""
    from tokenizers import pre_tokenizers

    tokenizer = records.load_tokenizer(helpers.make_tokenizer("unigram", tmp_path))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    assert set(tokenizer.backend_tokenizer.encode("fox over", add_special_tokens=False).word_ids) == {0}
    words = plain(pieces_by_word(tokenizer, "the quick fox, exactly 北京"))
    assert words == ["the", "quick", "fox,", "exactly", "北", "京"]


def test_a_cut_text_keeps_whole_numbering(tokenizer):
    """The last special token is a word of its own even where the text is cut inside a word."""
    for length in range(3, 40):
        pieces_by_word(tokenizer, LONG, length)


# -------------------------------------------------------------------------------------------------------------- lines

GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "not JSON: .* at column 2"),
        (b"[", "a JSON array over many lines"),
        (b'["q"]', "not a JSON object but a list"),
        (b'{"pos": ["p"]}', "\"query\" is missing; the line has 'pos'"),
        (b'{"query": 3, "pos": ["p"]}', '"query" must be a string, not a number'),
        (b'{"query": "q"}', '"pos" is missing'),
        (b'{"query": "q", "pos": "p"}', '"pos" must be a list of strings, not a string'),
        (b'{"query": "q", "pos": ["p", null]}', r'"pos"\[1\] must be a string, not null'),
        (b'{"query": "q", "pos": []}', '"pos" is empty'),
        (b'{"query": "q", "pos": ["p"], "neg": {}}', '"neg" must be a list of strings, not an object'),
        (b'{"query": "q", "pos": ["p"], "neg": [" \\n"]}', r'"neg"\[0\] is an empty text'),
        (b'{"query": "q", "pos": ["p"], "pos_scores": [1, 2]}', '"pos_scores" has 2 numbers for 1 texts'),
        (b'{"query": "q", "pos": ["p"], "pos_scores": [true]}', '"pos_scores" must be a list of numbers'),
        (b'{"query": "q", "pos": ["p"], "neg_scores": 3}', '"neg_scores" must be a list of numbers'),
        (b'{"query": "q", "pos": ["p"], "prompt": 3}', '"prompt" must be a string, not a number'),
        (b'{"query": "q \\ud800", "pos": ["p"]}', "half of a surrogate pair"),
        (b'{"query": "q", "pos": ["p"], "pos_scores": [NaN]}', "not standard JSON"),
        (b'{"query": "\xe9", "pos": ["p"]}', "not UTF-8 .byte 12 of the line is 0xe9"),
        (b"\x1f\x8b\x08\x00", "not text but gzip"),
    ],
)
def test_bad_lines_say_what_is_wrong(line, message):
    """A person must be able to mend the line from the message alone."""
    with pytest.raises(ValueError, match=message):
        records.parse_line(line, "finetune")


def test_pretrain_lines_need_a_text():
    """The two kinds are told apart: fine-tuning data given to pre-training is an error, not an empty run."""
    assert records.parse_line(b'{"text": "t", "id": 3}', "pretrain")["text"] == "t"
    with pytest.raises(ValueError, match="\"text\" is missing; the line has 'query', 'pos', 'neg'"):
        records.parse_line(orjson.dumps(GOOD), "pretrain")


def test_negatives_may_be_absent():
    """Without negatives of its own a query has the batch's: the key may be missing, null or empty."""
    for line in ({"query": "q", "pos": ["p"]}, GOOD | {"neg": None}, GOOD | {"neg": []}):
        assert records.parse_line(orjson.dumps(line), "finetune")["neg"] == []


# -------------------------------------------------------------------------------------------------------------- files


def lines_of(path, block_bytes: int) -> list[tuple[int, bytes]]:
    """(number, line) of all lines, as preprocessing counts them."""
    found = []
    for block in records.read_blocks(records.Source(path), 0, block_bytes):
        assert block.data
        rows = block.data.split(b"\n")
        found += [(number, row) for number, row in enumerate(rows, block.first) if row]
    return found


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_blocks_hold_whole_lines_with_their_numbers(tmp_path, ending, block_bytes):
    """Whatever the block size, no line is cut, lost or misnumbered: long, blank and unended ones included."""
    lines = [json.dumps({"text": "x" * n}) for n in (1, 300, 5, 0, 40)]
    text = "\n".join([lines[0], lines[1], "", *lines[2:]]).encode()
    path = tmp_path / f"a{ending}"
    text = b"\xef\xbb\xbf" + text  # some editors put this mark before UTF-8
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    wanted = [(n, line.encode()) for n, line in zip((1, 2, 4, 5, 6), lines, strict=True)]
    assert lines_of(path, block_bytes) == wanted


def test_progress_adds_up_to_the_file(tmp_path):
    """The progress bar counts bytes of the file itself, compressed or not, and ends at its size."""
    for name, data in (("a.jsonl", b'{"text": "x"}\n' * 500), ("b.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 500))):
        (tmp_path / name).write_bytes(data)
        blocks = list(records.read_blocks(records.Source(tmp_path / name), 0, 512))
        assert sum(block.advance for block in blocks) == len(data) and len(blocks) > 1


def test_broken_gzip_is_named(tmp_path):
    """A download cut short must not be read as a shorter data set."""
    data = gzip.compress(b'{"text": "x"}\n' * 5000)
    for name, content, message in (
        ("cut.jsonl.gz", data[:-9], r"cut\.jsonl\.gz:\d+: the gzip stream breaks off"),
        ("not.jsonl.gz", b'{"text": "x"}\n', r"not\.jsonl\.gz:1: not gzip"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(records.read_blocks(records.Source(tmp_path / name), 0))


def test_sources_of_folders_and_globs(tmp_path):
    """A folder gives its files sorted by name, no hidden ones; unknown ones are refused by name, or skipped."""
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", ".git"):
        (tmp_path / name).write_bytes(b"x")
    names = lambda found: [source.path.name for source in found]  # noqa: E731
    assert names(records.find_sources([str(tmp_path)])) == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert names(records.find_sources([str(tmp_path / "*.jsonl*")])) == ["b.jsonl", "c.jsonl.gz"]
    (tmp_path / "notes.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unknown kind of file: .*notes\.txt\. Read are \.json, .* --skip_unknown"):
        records.find_sources([str(tmp_path)])
    assert len(records.find_sources([str(tmp_path)], skip_unknown=True)) == 3
    for absent in ("none.jsonl", "*.none"):
        with pytest.raises(ValueError, match=r"no file .*none"):
            records.find_sources([str(tmp_path / absent)])


def test_datasets_folders_are_read_by_row(tmp_path):
    """A folder of datasets.save_to_disk gives the same lines as JSON; its rows count from 0, as in datasets."""
    datasets = pytest.importorskip("datasets")
    rows = [GOOD, GOOD | {"query": "另一个", "neg": []}]
    made = datasets.Dataset.from_list(rows).add_column("extra", [b"\xff", b"\xfe"])
    made.save_to_disk(tmp_path / "all" / "d")
    (source,) = records.find_sources([str(tmp_path / "all")])
    assert source.is_dataset and source.path.name == "d"
    (block,) = records.read_blocks(source, 0)
    assert block.first == 0 and block.advance == source.num_bytes()
    parsed = [records.parse_line(line, "finetune") for line in block.data.splitlines()]
    assert parsed == rows
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="is a DatasetDict of several splits: name the folder of one"):
        records.find_sources([str(tmp_path / "splits")])
