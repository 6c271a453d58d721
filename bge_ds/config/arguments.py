"""The flags of each training command, and what a command's settings exclude.

`parse(FinetuneArguments)` reads the command line (or one JSON file), and `FinetuneArguments.build(...)` takes keyword
values; both run the same checks and give arguments that can no longer be assigned to.
"""

from dataclasses import MISSING, dataclass
from typing import ClassVar, Literal

from bge_ds.config.parser import parse
from bge_ds.config.train_arguments import TrainArguments, changed, describe, flag, rare, steps_from
from bge_ds.config.validation import (
    check_effects,
    check_formats,
    check_groups,
    check_objective,
    check_token_budget,
    require,
)
from bge_ds.data.preprocess.instructions import PLAIN, before

__all__ = [
    "FinetuneArguments",
    "GroupArguments",
    "PretrainArguments",
    "RerankArguments",
    "TrainArguments",
    "changed",
    "describe",
    "parse",
    "steps_from",
]

TEMPERATURE_LIMIT = 0.5  # above it, similarities of unit vectors (-1 to 1) give a distribution too flat to learn from


@dataclass(kw_only=True)
class PretrainArguments(TrainArguments):
    """Flags of `python -m bge_ds.pretrain`: RetroMAE pre-training on plain texts."""

    command: ClassVar[str] = "bge_ds.pretrain"
    epochs_and_steps: ClassVar[bool] = True

    topic_pretraining: ClassVar[str] = "Pre-training"
    model_name_or_path: str = flag(
        "bert-base-uncased", "model to start from: name or folder; empty: from scratch, see config_name"
    )
    max_seq_length: int = flag(512, "maximum tokens of a text, special tokens included")
    word_segmenter: Literal["none", "jieba"] = rare(
        "none", "how Chinese is split into words, which are masked whole: none (each character) or jieba"
    )
    per_device_train_tokens: int | None = flag(  # type: ignore[misc]  # a constant where there is no such flag
        None, "maximum tokens of a rank's micro batch, filled with whole texts; unset: per_device_train_batch_size texts"
    )
    objective: Literal["retromae", "dupmae", "mlm"] = flag(
        "retromae", "retromae: masked language modelling, and a decoder that reconstructs the text from [CLS]; dupmae: also a "
        "bag-of-words loss on the other tokens; mlm: masked language modelling alone"
    )  # fmt: skip
    bow_loss_weight: float = flag(0.1, "with objective dupmae: weight of the bag-of-words loss")
    encoder_mlm_probability: float = flag(0.3, "fraction of the encoder's tokens that are masked, in whole words")
    decoder_mlm_probability: float = flag(0.5, "fraction of the words that each position of the decoder cannot attend to")
    decoder_query: Literal["embeddings", "raw"] = rare(
        "embeddings", "the decoder's queries: passed through the encoder's embedding module, or h + p_i as in the paper (raw)"
    )
    save_strategy: str = flag(
        "epoch", "no, steps, epoch or best; with epoch, save_steps may be given too and adds checkpoints between"
    )

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Tokens that a row's texts keep."""
        return (self.max_seq_length,)

    def rank_dependence(self) -> str | None:
        if not self.average_tokens_across_devices and not self.per_device_train_tokens:
            return "with --average_tokens_across_devices False the loss is a mean over each rank's own tokens"
        return None

    def check(self) -> None:
        """As for both commands, and: a model from scratch needs a configuration and a tokenizer."""
        super().check()
        decoder = "a decoder: --objective retromae or dupmae"
        check_effects(
            self,
            ("bow_loss_weight", "--objective dupmae", self.objective == "dupmae"),
            ("decoder_mlm_probability decoder_query", decoder, self.objective != "mlm"),
            remedy="change that",
        )
        require(
            self.per_device_train_tokens is None or "per_device_train_batch_size" not in self.explicit,
            "--per_device_train_tokens and --per_device_train_batch_size exclude each other: a micro batch is so many tokens "
            "or so many texts; keep one",
        )
        if "max_seq_length" in self.explicit:  # else it is the shards', which are not opened yet
            check_token_budget(self)
        if self.model_name_or_path:
            require(
                not self.config_name,
                f"--config_name {self.config_name} is for training from scratch, but --model_name_or_path is "
                f"{self.model_name_or_path}; add --model_name_or_path '' to train from scratch, or drop --config_name",
            )
        else:
            for name in ("config_name", "tokenizer_name"):
                require(getattr(self, name), f"--model_name_or_path is empty (from scratch), which needs --{name}")


@dataclass(kw_only=True)
class GroupArguments(TrainArguments):
    """What the commands share that train on groups of a query, its positives and its negatives."""

    instructions_for: ClassVar[str]  # how the names of the flags of instructions end

    topic_groups: ClassVar[str] = "Groups"
    model_name_or_path: str = flag(MISSING, "model to start from: name or folder")
    train_group_size: int = flag(8, "passages of each query: one positive, the others hard negatives")
    max_example_num_per_dataset: int = rare(100_000_000, "maximum groups of each input file; a longer one is sampled at random")
    same_dataset_within_batch: bool = flag(
        False, "all queries of a step, on all ranks, come from one input file, so that negatives are of the same kind"
    )
    small_threshold: int = rare(
        0, "with same_dataset_within_batch: files of a folder with fewer groups are one set; a file given by itself is left out"
    )
    drop_threshold: int = rare(0, "with small_threshold: such a set is left out if it has fewer groups than this")
    knowledge_distillation: bool = flag(False, "learn from a teacher's scores: pos_scores and neg_scores of the data")
    query_instruction_format: str = rare(
        PLAIN, "how instruction and query are joined; must end in {}, the query; \\n: a line break"
    )
    passage_instruction_format: str = rare(PLAIN, "how instruction and passage are joined; must end in {}, the passage")
    cache_path: str | None = rare(None, "folder for shards made from JSON lines; unset: cache_dir")
    pad_to_multiple_of: int | None = rare(None, "accepted for scripts of FlagEmbedding; nothing is padded")
    sub_batch_size: int | None = flag(
        None, "GradCache: texts (rerank: pairs) per forward pass; same gradient, less memory; unset: all"
    )
    sub_batch_tokens: int | None = flag(None, "GradCache: tokens per forward pass, in place of texts")

    topic_lora: ClassVar[str] = "LoRA"
    use_lora: bool = flag(False, "train only low-rank adapters of linear layers; saved merged, and in peft's format")
    lora_rank: int = flag(64, "with use_lora: rank of an adapter's matrices")
    lora_alpha: float = rare(16.0, "with use_lora: an adapter's product is multiplied by lora_alpha / lora_rank")
    lora_dropout: float = rare(0.1, "with use_lora: dropout of an adapter's input")
    target_modules: list[str] = rare(
        [], "with use_lora: names of the linear layers that get an adapter, such as query value; unset: all"
    )

    def check(self) -> None:
        """As for every command, and what of groups, pieces and adapters goes together."""
        super().check()
        require(self.model_name_or_path, "--model_name_or_path is empty; give the name or the folder of a model")
        require(
            self.average_tokens_across_devices,
            "--average_tokens_across_devices False is refused: the loss is the mean over the queries of all ranks",
        )
        require(
            self.kernels != "fused",
            "--kernels fused: fine-tuning takes fused kernels wherever they run; use auto, or torch to leave them out",
        )
        check_groups(self)
        check_formats(self)

    def prefix(self, of: str) -> str | None:
        """What stands before each text; of: "query" or "passage". None: no instruction was given."""
        instruction = getattr(self, f"{of}_instruction_for_{self.instructions_for}")
        return instruction and before(getattr(self, f"{of}_instruction_format"), instruction)

    def without_effect(self) -> list[str]:
        """Lines about what was given for the sake of a script and does nothing."""
        if not self.pad_to_multiple_of:
            return []
        return [f"--pad_to_multiple_of {self.pad_to_multiple_of} has no effect: nothing is padded"]


@dataclass(kw_only=True)
class FinetuneArguments(GroupArguments):
    """Flags of `python -m bge_ds.finetune`: contrastive fine-tuning on queries with positives and negatives."""

    command: ClassVar[str] = "bge_ds.finetune"
    instructions_for: ClassVar[str] = "retrieval"

    topic_finetuning: ClassVar[str] = "Fine-tuning"
    query_max_len: int = flag(32, "maximum tokens of a query, instruction and special tokens included")
    passage_max_len: int = flag(128, "maximum tokens of a passage, instruction and special tokens included")
    query_instruction_for_retrieval: str | None = flag(None, "prefix of every query, saved as the model's query prompt")
    passage_instruction_for_retrieval: str | None = flag(None, "prefix of every passage, saved as the model's passage prompt")
    negatives_cross_device: bool = flag(False, "the passages of all ranks are negatives, not only the rank's own")
    use_inbatch_neg: bool = flag(True, "the other queries' passages are negatives too")
    bidirectional: bool = flag(False, "also score each positive against all queries; the loss is the mean of both directions")
    mask_false_negatives: bool = flag(True, "do not use a passage as a negative if its text is one of the query's positives")
    false_negative_margin: float | None = flag(
        None,
        "do not use a passage as a negative if its similarity exceeds the positive's by this; may be negative; unset: off",
    )
    false_negative_margin_type: Literal["absolute", "relative"] = rare(
        "absolute", "absolute: a difference of similarities; relative: a fraction of the positive's similarity"
    )
    temperature: float = flag(0.02, "similarities are divided by it; always 1 without normalize_embeddings")
    learnable_temperature: bool = flag(False, "train the temperature, starting at --temperature")
    kd_loss_type: Literal["kl_div", "m3_kd_loss", "margin_mse"] = flag(
        "kl_div", "kl_div and margin_mse are added to the contrastive loss, m3_kd_loss replaces it"
    )
    use_mrl: bool = flag(False, "Matryoshka: the mean of the loss over prefixes of the vectors")
    mrl_dims: list[int] = flag([], "with use_mrl: the prefixes' lengths, such as 64 128 256 768")
    normalize_embeddings: bool = flag(True, "normalise vectors to length 1; alias normlized")
    additional_special_tokens: list[str] = rare(
        [], "tokens that the tokenizer and the model's embeddings get beside their own, such as '<instruct>' '<query>'"
    )
    sentence_pooling_method: Literal["cls", "mean", "last_token"] = flag("cls", "how token vectors become a text's vector")
    bidirectional_attention: bool = flag(False, "decoder backbones: bidirectional instead of causal attention")
    fix_position_embedding: bool = rare(False, "do not train parameters whose name contains position_embeddings")

    @property
    def text_lengths(self) -> tuple[int, ...]:
        return self.query_max_len, self.passage_max_len

    @property
    def heeds_types(self) -> bool:
        """Whether a line's `type` has FlagEmbedding's meaning, which it has where each batch is of one set."""
        return self.same_dataset_within_batch

    def without_effect(self) -> list[str]:
        found = super().without_effect()
        if self.kd_loss_type != "kl_div" and not self.knowledge_distillation:
            found.append(f"--kd_loss_type {self.kd_loss_type} has no effect: --knowledge_distillation is off")
        return found

    def rank_dependence(self) -> str | None:
        if self.use_inbatch_neg and not self.negatives_cross_device:
            return "without --negatives_cross_device a query's negatives are the passages of its own rank"
        return None

    def check(self) -> None:
        """As for groups, and: the temperature fits the similarity, and there is something to compare against.

        Instructions become what stands before a text, in their format: that is what a model's prompt holds.
        """
        super().check()
        for of in ("query", "passage"):
            setattr(self, f"{of}_instruction_for_retrieval", self.prefix(of) or None)
        if not self.normalize_embeddings:
            require(
                "temperature" not in self.explicit or self.temperature == 1.0,
                f"--temperature {self.temperature:g} and --normalize_embeddings False exclude each other: "
                "inner products of vectors of any length are not divided; drop --temperature, or normalise",
            )
            self.temperature = 1.0
        require(
            not self.normalize_embeddings or self.temperature <= TEMPERATURE_LIMIT,
            f"--temperature {self.temperature:g} is too high for normalised vectors (--normalize_embeddings True), "
            f"whose similarities lie between -1 and 1; give at most {TEMPERATURE_LIMIT}, 0.01 to 0.05 is usual",
        )
        require(
            self.use_inbatch_neg or not self.negatives_cross_device,
            "--negatives_cross_device and --use_inbatch_neg False exclude each other: without in-batch negatives no "
            "other query's passage is compared; drop one of them",
        )
        require(
            all(map(str.strip, self.additional_special_tokens)),
            "--additional_special_tokens holds an empty token; leave it out",
        )
        check_objective(self)
        alone = not self.use_inbatch_neg or (self.per_device_train_batch_size == 1 and not self.negatives_cross_device)
        require(
            self.train_group_size > 1 or not alone,
            "--train_group_size 1 leaves each query its positive and nothing to compare it against; raise it, or take "
            "in-batch negatives (--use_inbatch_neg True with --per_device_train_batch_size above 1)",
        )


@dataclass(kw_only=True)
class RerankArguments(GroupArguments):
    """Flags of `python -m bge_ds.rerank`: a cross-encoder, trained on groups of pairs of a query and a passage."""

    command: ClassVar[str] = "bge_ds.rerank"
    instructions_for: ClassVar[str] = "rerank"

    topic_reranking: ClassVar[str] = "Reranking"
    query_max_len: int = flag(
        32, "tokens of a query, which may take a quarter of passage_max_len more (FlagEmbedding's rule); unset: the shards'"
    )
    passage_max_len: int = flag(
        128, "tokens of a passage, which may take half of query_max_len more where its query leaves room; unset: the shards'"
    )
    max_len: int | None = flag(
        None, "maximum tokens of a pair, special tokens and prompt included; never above query_max_len + passage_max_len"
    )
    loss: Literal["cross_entropy", "binary_cross_entropy", "none"] = flag(
        "cross_entropy", "cross_entropy: the positive among its group; binary_cross_entropy: each pair by itself; none: the "
        "teacher's alone"
    )  # fmt: skip
    label_smoothing: float = flag(0.0, "with loss cross_entropy: this much of the target is spread over the group")
    kd_loss_type: Literal["kl_div", "margin_mse", "ranknet"] = flag(
        "kl_div",
        "with knowledge_distillation, added to the loss: listwise, of differences to the positive, or of pairs in order",
    )
    query_instruction_for_rerank: str | None = flag(None, 'prefix of every query; unset: none, of decoders "A: "')
    passage_instruction_for_rerank: str | None = flag(None, 'prefix of every passage; unset: none, of decoders "B: "')
    prompt: str | None = rare(None, "decoders: what is asked after the pair; unset: the data's `prompt`, else FlagEmbedding's")
    sep_token: str = rare("\\n", "decoders: what stands between query, passage and prompt; \\n is a line break")
    eval_search_results: list[str] = flag(
        [], "with eval_data: the lists to rerank, a TREC run or JSON {query: {passage: score}} for each folder; unset: BM25's"
    )
    eval_rerank_depth: int = flag(100, "with eval_data: passages of a query that are scored")
    model_type: Literal["encoder", "decoder"] | None = rare(None, "what the model must be; unset: as its files say")

    @property
    def cuts(self) -> dict[str, int]:
        """The most tokens of a query, of a passage and of a pair, as FlagEmbedding has them.

        Of a query and a passage without special tokens. Under --max_len a query takes three quarters of a pair at most.
        """
        query, passage = self.query_max_len, self.passage_max_len
        pair, longest = query + passage, query + passage // 4
        if self.max_len is not None and self.max_len < pair:
            pair, longest = self.max_len, min(longest, self.max_len * 3 // 4)
        return {"query_max_len": longest, "passage_max_len": passage + query // 2, "max_len": pair}

    @property
    def text_lengths(self) -> tuple[int, ...]:
        return self.cuts["query_max_len"], self.cuts["passage_max_len"]

    def rank_dependence(self) -> str | None:
        return None

    def check(self) -> None:
        """As for groups, and: there is a loss."""
        super().check()
        check_effects(self, ("eval_search_results eval_rerank_depth", "--eval_data, the folders to rank", self.eval_data))
        folders, files = len(self.eval_data), len(self.eval_search_results)
        require(
            files in (0, folders),
            f"--eval_search_results names {files} files for {folders} folders of --eval_data; give one for each, or none",
        )
        require(
            self.train_group_size > 1,
            "--train_group_size 1 leaves each query its positive and nothing to rank it against; give 2 or more",
        )
        require(
            self.loss != "none" or self.knowledge_distillation,
            "--loss none leaves no loss without --knowledge_distillation; add that, or give another --loss",
        )
        instructed = bool(self.query_instruction_for_rerank)
        check_effects(self, ("query_instruction_format", "--query_instruction_for_rerank", instructed))
        check_effects(
            self,
            ("label_smoothing", "--loss cross_entropy", self.loss == "cross_entropy"),
            ("kd_loss_type", "--knowledge_distillation", self.knowledge_distillation),
            remedy="change that",
        )
