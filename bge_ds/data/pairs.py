"""Query and passage to one sequence of token ids: what a cross-encoder reads. Arithmetic on ids, without a tokenizer's help.

    encoders   by the tokenizer's template for pairs, such as [CLS] query [SEP] passage [SEP] or <s> query </s></s> passage </s>
    decoders   [bos] query \\n passage \\n prompt, the query beginning with "A: ", the passage with "B: " (FlagEmbedding)

Shapes: K pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bge_ds.data.ragged import RaggedArrays, inside, stretches

# FlagEmbedding's, word for word: its decoders were trained with them.
PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a prediction"
    " of either 'Yes' or 'No'."
)
QUERY_PREFIX, PASSAGE_PREFIX, SEPARATOR = "A: ", "B: ", "\n"


class Pairs(NamedTuple):
    """ids: int32, of each pair, special tokens included. second_K: int64, the position from which a pair's token types are 1;
    None where the tokenizer gives no types."""

    ids: RaggedArrays
    second: np.ndarray | None


@dataclass(frozen=True)
class PairLayout:
    """The ids before a query, between query and passage, and after the passage.

    second: how many of `between` have token type 0, after which all is 1; None: no token types.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    second: int | None = None

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> PairLayout:
        """An encoder's, from the template of a fast tokenizer.

        Raises ValueError for one that puts nothing between the two texts, or whose token types are not 0, then 1.
        """
        made = tokenizer.backend_tokenizer.encode("a", "a")
        sides = [-1 if side is None else side for side in made.sequence_ids]
        name = f"tokenizer {tokenizer.name_or_path}"
        if sides.count(0) == 0 or sides.count(1) == 0:
            raise ValueError(f"{name} has no token for the letter a, by which its layout of pairs is found: use another")
        first, second = sides.index(0), sides.index(1)
        last, end = first + sides.count(0), second + sides.count(1)  # ends of the two texts
        if last >= second:
            raise ValueError(
                f"{name} has no layout for pairs (it makes {' '.join(made.tokens)} of two texts): use one with a special token "
                "between query and passage"
            )
        types = made.type_ids
        if types != sorted(types) or set(types) - {0, 1}:
            raise ValueError(f"{name} gives a pair the token types {types}; only 0 for the query and then 1 are supported")
        has_types = "token_type_ids" in tokenizer.model_input_names and 1 in types
        before, between, after = (tuple(made.ids[part]) for part in (slice(first), slice(last, second), slice(end, None)))
        return cls(before, between, after, types[last:second].count(0) if has_types else None)

    @classmethod
    def of_decoder(cls, tokenizer: Any, prompt: str = PROMPT, separator: str = SEPARATOR) -> PairLayout:
        """A decoder's. Its queries and passages begin with QUERY_PREFIX and PASSAGE_PREFIX, which are tokenized with them."""
        between, asked = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (separator, prompt))
        bos = tokenizer.bos_token_id
        before = () if bos is None or bos == tokenizer.pad_token_id else (bos,)
        return cls(before, tuple(between), (*between, *asked))

    @property
    def added(self) -> int:
        """Tokens of a pair beside those of its texts."""
        return len(self.before) + len(self.between) + len(self.after)

    def check_room(self, query_max_len: int, max_len: int) -> None:
        """Raises ValueError where the longest query leaves no room for a passage."""
        if query_max_len + self.added >= max_len:
            raise ValueError(
                f"a query of {query_max_len} tokens and the {self.added} that every pair has leave no room for a passage in "
                f"{max_len}: give a pair {query_max_len + self.added + 1} tokens or more, or queries fewer"
            )

    def build(
        self, queries: RaggedArrays, passages: RaggedArrays, *, query_max_len: int, passage_max_len: int, max_len: int
    ) -> Pairs:
        """Pairs of K queries and K passages, which are ids without special tokens.

        A query is cut to query_max_len, a passage to passage_max_len and then so that the pair has at most max_len tokens
        (`truncation="only_second"` of transformers). Raises ValueError as `check_room`.
        """
        self.check_room(query_max_len, max_len)
        query_K = np.minimum(queries.lengths, query_max_len)
        passage_K = np.minimum(passages.lengths, np.minimum(passage_max_len, max_len - self.added - query_K))
        length_K = query_K + passage_K + self.added
        ids, at_K = np.empty(length_K.sum(), np.int32), np.cumsum(length_K) - length_K

        def put(values: np.ndarray, count_K: np.ndarray) -> None:
            """Next in each pair: so many of the values, which lie end to end."""
            nonlocal at_K
            ids[inside(count_K) + np.repeat(at_K, count_K)] = values
            at_K = at_K + count_K

        def put_special(tokens: tuple[int, ...]) -> None:
            put(np.tile(np.array(tokens, np.int32), len(length_K)), np.full(len(length_K), len(tokens)))

        put_special(self.before)
        put(stretches(queries.values, queries.starts, query_K), query_K)
        put_special(self.between)
        put(stretches(passages.values, passages.starts, passage_K), passage_K)
        put_special(self.after)
        second_K = None if self.second is None else len(self.before) + query_K + self.second
        return Pairs(RaggedArrays(ids, length_K), second_K)
