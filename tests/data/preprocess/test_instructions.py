"""What stands before a text: formats, a line's own prompt and type, special tokens; in shards and in what reads them."""

from __future__ import annotations

import json

import helpers
import pytest

from bge_ds import preprocess
from bge_ds.data.preprocess import instructions, prepare, validate
from bge_ds.data.shards import manifest_file, shard_reader
from bge_ds.encoding.inputs import ShardInput


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(kind, given, output, tokenizer, *more) -> int:
    return preprocess.main([kind, "--input", given, "--output", str(output), "--tokenizer", str(tokenizer), *more])


@pytest.mark.parametrize("form", ["{}", "{}{} ?", "{}{}{}", "{a}{}", "{}{0}", "{{}}{}{}"])
def test_a_format_has_two_places_and_ends_in_the_second(form):
    assert not instructions.is_format(form) and instructions.is_format("{}{}")
    assert instructions.is_format(r"<i>{}\n<q>{}") and instructions.before(r"<i>{}\n<q>{}", "{} do") == "<i>{} do\n<q>"


def test_a_line_s_prompt_goes_through_the_format_and_before_passages_of_symmetric_types(tmp_path, tiny_tokenizer_path):
    """As FlagEmbedding has it where each batch is of one set. A text that is both kinds of passage is stored twice, with the
    one hash that finds equal texts; without --passages_by_type a type changes nothing."""
    tokenizer = validate.load_tokenizer(tiny_tokenizer_path)
    lines = [
        {"query": "fox", "pos": ["dog"], "neg": ["lazy"], "prompt": "jumps", "type": "symmetric_sts"},
        {"query": "fox", "pos": ["dog"], "neg": ["lazy"], "type": "symmetric_clustering"},
        {"query": "fox", "pos": ["dog"], "neg": ["lazy"], "prompt": "jumps", "type": "symmetric_class"},
        {"query": "fox", "pos": ["dog"], "neg": ["lazy"], "prompt": ""},
    ]
    data = write(tmp_path / "a.jsonl", lines)
    more = ["--query_instruction_for_retrieval", "over ", "--query_instruction_format", r"the {}\nof {}"]
    more += ["--passage_instruction_for_retrieval", "a "]
    queries = ["the jumps\nof fox", "over fox", "the jumps\nof fox", "the \nof fox"]
    for flags, before in ((["--passages_by_type"], ["the jumps\nof ", "over ", "a ", "a "]), ([], ["a "] * 4)):
        folder = tmp_path / f"s{len(flags)}"
        assert run("finetune", data, folder, tiny_tokenizer_path, *more, *flags) == 0
        opened = shard_reader.open_folder(folder)
        groups = [opened.group(row) for row in range(4)]
        assert [group.query.tolist() for group in groups] == tokenizer(queries)["input_ids"]
        wanted = [tokenizer(f"{prefix}dog")["input_ids"] for prefix in before]
        assert [opened.passage(group.pos[0]).tolist() for group in groups] == wanted
        assert opened.num_passages == 2 * len(set(before))
        assert len({int(opened.hashes(group.pos)[0]) for group in groups}) == 1
        assert opened.manifest.passages_by_type == bool(flags)
        assert opened.manifest.query_instruction_format == r"the {}\nof {}"
    ShardInput([str(tmp_path / "s0")], "passage").check(validate.core(tokenizer), "a ")
    with pytest.raises(ValueError, match=r"hold.* passages that begin as their query does"):
        ShardInput([str(tmp_path / "s1")], "passage").check(validate.core(tokenizer), "a ")
    how = {"query_max_len": 32, "passage_max_len": 128, "query_instruction_format": r"the {}\nof {}"}
    with pytest.raises(
        ValueError, match=r"type symmetric_clustering, whose passages must not begin .* and here do: preprocess"
    ):
        prepare.prepare("finetune", str(tmp_path / "s1"), tokenizer, **how)
    with pytest.raises(ValueError, match=r"whose passages must begin .* and here do not: .* --passages_by_type True"):
        prepare.prepare("finetune", str(tmp_path / "s0"), tokenizer, passages_by_type=True, **how)
    explicit = frozenset({"query_instruction_format"})
    with pytest.raises(ValueError, match=r"query_instruction_format '\{\}\{\}' differs from the"):
        prepare.prepare("finetune", str(tmp_path / "s0"), tokenizer, explicit=explicit)
    assert prepare.prepare("finetune", str(tmp_path / "s0"), tokenizer, explicit=explicit, **how) == tmp_path / "s0"


def test_special_tokens_and_formats_that_preprocessing_is_given(tmp_path, tiny_tokenizer_path, capsys):
    """Shards of a tokenizer with more tokens are another tokenizer's; a format that does not end in the text is refused.

    The tiny tokenizer's ids have gaps, and its core would give a new token the id of a word."""
    whole = helpers.make_tokenizer("bytes", tmp_path / "bytes")
    data = write(tmp_path / "a.jsonl", [{"query": "<i>fox", "pos": ["dog"]}, {"query": "fox", "pos": ["the"]}])
    for folder, more in (("plain", []), ("more", ["--additional_special_tokens", "<i>"])):
        assert run("finetune", data, tmp_path / folder, whole, *more) == 0
    plain, more = (manifest_file.read_manifest(tmp_path / name).tokenizer for name in ("plain", "more"))
    assert plain.fingerprint != more.fingerprint and more.vocab_size == plain.vocab_size + 1
    assert plain.vocab_size in shard_reader.open_folder(tmp_path / "more").group(0).query
    capsys.readouterr()
    assert run("finetune", data, tmp_path / "no", tiny_tokenizer_path, "--query_instruction_format", "{}{} ?") == 2
    assert "query_instruction_format '{}{} ?' must hold {} twice" in capsys.readouterr().err
    assert run("finetune", data, tmp_path / "no", tiny_tokenizer_path, "--additional_special_tokens", "<i>") == 2
    assert "its ids have gaps, and a new token would have that of another" in capsys.readouterr().err
    assert run("finetune", data, tmp_path / "known", tiny_tokenizer_path, "--additional_special_tokens", "[MASK]") == 0


def test_passages_of_a_corpus_cannot_begin_by_type(tmp_path, tiny_tokenizer_path, capsys):
    data = write(tmp_path / "a.jsonl", [{"query": "fox", "pos_ids": ["1"], "type": "symmetric_sts"}])
    corpus = write(tmp_path / "c.jsonl", [{"_id": "1", "text": "dog"}])
    more = ["--corpus", corpus, "--passages_by_type"]
    assert run("finetune", data, tmp_path / "s", tiny_tokenizer_path, *more) == 2
    assert "give such lines with their texts" in capsys.readouterr().err
