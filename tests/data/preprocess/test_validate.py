"""Lines and tokens: bad lines are named, ids are the tokenizer's own, words are words for every kind of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import helpers
import numpy as np
import orjson
import pytest
from transformers import AutoTokenizer

from bge_ds.data.preprocess import tokenize, validate

LONG = "retrieval models embed questions and passages into one vector space, " * 40


@pytest.fixture(scope="module", params=["wordpiece", "bytes", "unigram"])
def tokenizer(request, tmp_path_factory):
    folder = helpers.make_tokenizer(request.param, tmp_path_factory.mktemp(request.param))
    return validate.load_tokenizer(folder)


def ids_of(encoder, texts: list[str], length: int, prefix: str | list[str] = "") -> tuple[list[list[int]], list[bool]]:
    """Ids of each text, none of one without text, and whether it was cut."""
    made = encoder.encode(texts, length, prefix)
    return [ids.tolist() for ids in made.ids.split()], made.cuts.tolist()


def ids_and_words(encoder, texts: list[str], length: int) -> tuple[list[list[int]], list[np.ndarray], list[bool]]:
    """What `encode` says of each text: its ids, the word of each, whether it was cut; nothing of one without text."""
    made = encoder.encode(texts, length, words=True)
    words = made.ids._replace(values=made.words).split()
    return [ids.tolist() for ids in made.ids.split()], words, made.cuts.tolist()


def pieces_by_word(tokenizer, text: str, length: int = 512) -> list[list[str]]:
    """The tokens of a text, those of one word together, special tokens left out."""
    core = validate.core(tokenizer)
    (ids,), (words,), _ = ids_and_words(validate.BatchTokenizer(core), [text], length)
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
    for tokenizer in (raw, validate.load_tokenizer(minilm_path)):
        (long, short), cuts = ids_of(validate.BatchTokenizer(validate.core(tokenizer)), [LONG, "hi"], 300)
        assert (len(long), len(short)) == (300, 3)
        assert cuts[0] > 0 == cuts[1]
        assert long[0] == short[0] == 101 and long[-1] == short[-1] == 102
    assert raw.backend_tokenizer.truncation is not None, "core() changed a tokenizer that it was lent"


def test_ids_are_those_of_the_tokenizer_cut_before_its_last_special(tokenizer):
    """Rows equal what transformers itself gives with truncation, so training and serving see the same inputs."""
    encoder = validate.BatchTokenizer(validate.core(tokenizer))
    texts = [*helpers.SENTENCES, LONG, "a", "北京 hello <mask> [MASK]"]
    for length in (3, 16, 64, 2048):
        wanted = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        rows, _ = ids_of(encoder, texts, length)
        assert rows == wanted
        with_words, words, _ = ids_and_words(encoder, texts, length)
        assert with_words == wanted and [len(w) for w in words] == [len(row) for row in wanted]


def test_instruction_is_a_plain_prefix(tokenizer):
    """No separator is added: ids are those of the two strings put together, specials inside the length."""
    rows, cuts = ids_of(validate.BatchTokenizer(validate.core(tokenizer)), ["fox jumps", LONG], 20, "question: ")
    whole = [tokenizer("question: " + text)["input_ids"] for text in ("fox jumps", LONG)]
    assert rows[0] == whole[0] and cuts == [0, len(whole[1]) - 20]  # as many tokens as the length leaves no room for
    assert rows[1] == tokenizer("question: " + LONG, truncation=True, max_length=20)["input_ids"]


@pytest.mark.parametrize("text", ["\u200b\u200d", "[SEP] [PAD]"])
@pytest.mark.parametrize("prefix", ["", "query: "])
def test_a_text_without_a_token_of_its_own_is_empty(minilm_path, text, prefix):
    """Zero-width characters and special tokens say nothing; an instruction before them must not hide that."""
    encoder = validate.BatchTokenizer(validate.core(validate.load_tokenizer(minilm_path)))
    rows, _ = ids_of(encoder, [text, "fine", "!", "中"], 16, prefix)
    assert rows[0] == [] and all(rows[1:])


def test_lengths_without_room_are_refused(tokenizer):
    """A length that the specials and the instruction fill would train on the instruction alone."""
    encoder = validate.BatchTokenizer(validate.core(tokenizer))
    encoder.check_room(3, "query_max_len")
    with pytest.raises(ValueError, match=r"query_max_len 2 leaves no room for text: special tokens take 2 .* give 3"):
        encoder.check_room(2, "query_max_len")
    with pytest.raises(ValueError, match="query_max_len 4 leaves no room for text: special tokens and instruction"):
        encoder.check_room(4, "query_max_len", "the quick brown fox")


# ------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_survives_saving_and_calling(tokenizer, tmp_path):
    """Shards made with the base model's tokenizer serve the model trained from it, which saved the tokenizer again."""
    before = validate.fingerprint(tokenizer)
    tokenizer(["a b c"], truncation=True, max_length=4, padding="max_length")
    assert validate.fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert validate.fingerprint(validate.load_tokenizer(tmp_path)) == before


def test_fingerprint_tells_tokenizers_apart(tokenizer, minilm_path):
    """One more token, another normaliser: the ids differ, so the fingerprint must."""
    known = validate.fingerprint(tokenizer)
    assert known != validate.fingerprint(validate.load_tokenizer(minilm_path))
    parts = orjson.loads(tokenizer.backend_tokenizer.to_str())
    parts["normalizer"] = {"type": "Lowercase"}
    other = type(tokenizer)(tokenizer_object=validate.Tokenizer.from_str(orjson.dumps(parts).decode()))
    assert validate.fingerprint(other) != known


def test_slow_and_absent_tokenizers_are_refused(tmp_path, monkeypatch):
    """A slow tokenizer knows no word ids: saying so is better than whole words that silently become tokens."""
    with pytest.raises(ValueError, match=r"tokenizer .*nowhere cannot be loaded: .*give a folder or a hub name"):
        validate.load_tokenizer(tmp_path / "nowhere")

    class Slow:
        is_fast = False

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Slow())
    with pytest.raises(ValueError, match="tokenizer x: Slow has no fast version"):
        validate.load_tokenizer("x")


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
    tokenizer = validate.load_tokenizer(minilm_path)
    assert len(pieces_by_word(tokenizer, "北京是中国的首都，人口很多。")) == 14


def test_bytes_of_one_character_stay_together(tmp_path):
    """Byte-level BPE may cut a character into three tokens: hiding one of them alone would hide nothing."""
    tokenizer = validate.load_tokenizer(helpers.make_tokenizer("bytes", tmp_path))
    words = pieces_by_word(tokenizer, "龘龘x")
    assert [len(word) for word in words] == [3, 3, 1]


def test_spaces_part_words_where_the_tokenizer_has_no_pre_tokenizer(tmp_path):
    """Some SentencePiece conversions call the whole text one piece; then white space tells the words."""
    from tokenizers import pre_tokenizers

    tokenizer = validate.load_tokenizer(helpers.make_tokenizer("unigram", tmp_path))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    assert set(tokenizer.backend_tokenizer.encode("fox over", add_special_tokens=False).word_ids) == {0}
    words = plain(pieces_by_word(tokenizer, "the quick fox, exactly 北京"))
    assert words == ["the", "quick", "fox,", "exactly", "北", "京"]


def segmented(tokenizer, text: str, length: int = 512) -> list[str]:
    """The pieces of each word, joined, where jieba tells the words; the special tokens at the ends left out."""
    encoder = validate.BatchTokenizer(validate.core(tokenizer), "jieba")
    (ids,), (words,), _ = ids_and_words(encoder, [text], length)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    found = [[] for _ in range(words[-1] + 1)]
    for token, word in zip(tokens, words, strict=True):
        found[word].append(token.removeprefix("##"))
    return ["".join(word) for word in found[1:-1]]


def test_a_segmenter_tells_the_words_of_chinese(minilm_path):
    """Tokens of one word that jieba finds are masked together; Latin words, digits and punctuation are as without it."""
    pytest.importorskip("jieba")
    tokenizer = validate.load_tokenizer(minilm_path)
    found = segmented(tokenizer, "他来到北京大学，unbelievable thunderstorms 2026 北京")
    assert "北京大学" in "".join(found) and found[-1] == "北京" and "，" in found
    assert [word for word in found if word.isascii() and word.isalpha()] == ["unbelievable", "thunderstorms"]
    assert len(found) < len("他来到北京大学，北京") + 3


def test_segmented_words_do_not_depend_on_the_cut(minilm_path):
    """Only the stretch that the last token lies in is looked at, and it whole: a shorter length gives the same words."""
    pytest.importorskip("jieba")
    tokenizer = validate.load_tokenizer(minilm_path)
    encoder = validate.BatchTokenizer(validate.core(tokenizer), "jieba")
    text = "中华人民共和国的首都是北京。研究生命的起源，很有意思。" * 3
    _, (whole,), _ = ids_and_words(encoder, [text], 512)
    for length in range(3, 40):
        _, (words,), (cut,) = ids_and_words(encoder, [text], length)
        assert cut and words[:-1].tolist() == whole[: length - 1].tolist() and words[-1] == words[-2] + 1


def test_bytes_of_a_segmented_character_stay_together(tmp_path):
    """Byte-level tokens of one character begin no word, and no token is cut where a word ends."""
    pytest.importorskip("jieba")
    tokenizer = validate.load_tokenizer(helpers.make_tokenizer("bytes", tmp_path))
    encoder = validate.BatchTokenizer(validate.core(tokenizer), "jieba")
    (ids,), (words,), _ = ids_and_words(encoder, ["北京是中国的首都"], 512)
    assert (np.diff(words) >= 0).all() and (np.diff(words) <= 1).all() and len(ids) == len(words)
    assert words[-1] + 1 < 2 + 8


def test_a_missing_segmenter_is_named_with_the_remedy(minilm_path, monkeypatch):
    """Shards without the words asked for would be silent: the run ends, with the command that installs it."""
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ValueError, match=r"needs jieba, which is not installed: pip install jieba"):
        validate.BatchTokenizer(validate.core(validate.load_tokenizer(minilm_path)), "jieba")


def test_a_batch_gives_what_each_text_gives_alone(tokenizer, monkeypatch):
    """Texts are encoded many at a time: neighbours, silent ones among them, and where a batch ends change no row."""
    unusual = ["</s>", "[SEP]", "\u200b", "北京 quick是", "กรุงเทพ hello", "a<mask>b [MASK]c", "e\u0301 ﾃｽﾄ 東京"]
    texts = [*helpers.SENTENCES, *unusual, LONG, "!", *unusual[::-1], LONG]
    encoder = validate.BatchTokenizer(validate.core(tokenizer))
    alone = [ids_and_words(encoder, [text], 40) for text in texts]
    prefixes = (["", "query: ", "[SEP]"] * 8)[: len(texts)]
    alone_ids = [ids_of(encoder, [text], 40, prefix) for text, prefix in zip(texts, prefixes, strict=True)]
    for size in (1, 3, 5, 256):
        monkeypatch.setattr(tokenize, "BATCH", size)
        rows, words, cuts = ids_and_words(encoder, texts, 40)
        assert rows == [row for (row,), _, _ in alone] and cuts == [cut for *_, (cut,) in alone]
        assert [found.tolist() for found in words] == [wanted.tolist() for _, (wanted,), _ in alone]
        assert ids_of(encoder, texts, 40, prefixes) == ([row for (row,), _ in alone_ids], [cut for _, (cut,) in alone_ids])
    assert [] in rows and max(cuts) > 0 and encoder.encode([], 40, words=True).ids.lengths.tolist() == []


def test_encoding_starts_no_thread():
    """A process with threads must not fork, and workers would fight over the cores; the caller's setting is put back."""
    if not Path("/proc/self/task").exists():
        pytest.skip("the threads of a process are counted under /proc")
    for given in ([], ["true"]):
        env = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
        if given:
            env["TOKENIZERS_PARALLELISM"] = given[0]
        with tempfile.TemporaryDirectory() as folder:
            helpers.make_tokenizer("wordpiece", Path(folder))
            subprocess.run(helpers.program("threads_of_encoding", folder, *given), check=True, env=env, timeout=120)


def test_a_segmenters_dictionary_waits_for_the_first_text_that_needs_it(minilm_path, monkeypatch):
    """It takes seconds to read: a run over English, or one that only checks lengths, must not wait for it."""
    jieba = pytest.importorskip("jieba")
    made = []
    tokenizer = jieba.Tokenizer
    monkeypatch.setattr(jieba, "Tokenizer", lambda: made.append(1) or tokenizer())
    encoder = validate.BatchTokenizer(validate.core(validate.load_tokenizer(minilm_path)), "jieba")
    encoder.encode(["plain words, é"], 64, words=True)
    assert made == []
    encoder.encode(["北京大学"], 64, words=True), encoder.encode(["北京大学"], 64, words=True)
    assert made == [1]


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
        validate.parse_line(line, "finetune")


def test_pretrain_lines_need_a_text():
    """The two kinds are told apart: fine-tuning data given to pre-training is an error, not an empty run."""
    assert validate.parse_line(b'{"text": "t", "id": 3}', "pretrain")["text"] == "t"
    with pytest.raises(ValueError, match="\"text\" is missing; the line has 'query', 'pos', 'neg'"):
        validate.parse_line(orjson.dumps(GOOD), "pretrain")


def test_negatives_may_be_absent():
    """Without negatives of its own a query has the batch's: the key may be missing, null or empty."""
    for line in ({"query": "q", "pos": ["p"]}, GOOD | {"neg": None}, GOOD | {"neg": []}):
        assert validate.parse_line(orjson.dumps(line), "finetune")["neg"] == []
