"""Every flag of the two training commands: what it means, what it may be, and which settings exclude each other.

`parse(FinetuneArguments)` reads the command line (or one JSON file), and `FinetuneArguments.build(...)` takes keyword
values; both run the same checks. Names are those of ``transformers.TrainingArguments`` wherever it has one, and
``training_arguments.py`` lists those of its names that are refused. Nothing here looks at disks, devices or ranks:
whether a path exists is the business of whoever opens it, since N ranks would race to answer.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from bge_ds.config.parser import parse
from bge_ds.config.validation import (
    SCHEDULES,
    check_conflicts,
    check_data,
    check_evaluation,
    check_lora,
    check_objective,
    check_optimizer,
    check_ranges,
    check_token_budget,
    choose,
    count_or_share,
    require,
    writers,
)

__all__ = ["FinetuneArguments", "PretrainArguments", "TrainArguments", "changed", "describe", "parse", "steps_from"]

TEMPERATURE_LIMIT = 0.5  # above it, similarities of unit vectors (-1 to 1) give a distribution too flat to learn from


def _flag(default: Any, text: str, **extra: Any) -> Any:
    """A field with its help text; `extra` goes to argparse. Percent signs in `text` are plain text."""
    return field(default=default, metadata={"help": text.replace("%", "%%"), **extra})


@dataclass(kw_only=True)
class TrainArguments:
    """What both commands share. Lengths are in tokens, batches in texts or groups, steps in optimizer steps."""

    command: ClassVar[str] = "bge_ds"
    epochs_and_steps: ClassVar[bool] = False  # whether save_steps adds to save_strategy epoch
    per_device_train_tokens: ClassVar[int | None] = None  # a flag of pretrain alone

    # Model and data
    output_dir: str = field(metadata={"help": "folder for the model, checkpoint-N/ and metrics.jsonl"})
    train_data: list[str] = field(
        metadata={"help": "shards made by bge_ds.preprocess, or JSON lines (file, folder or glob) to preprocess into a cache; "
                  "several may be given, each as PATH or, for a share of the texts other than by its rows, PATH=WEIGHT"}
    )  # fmt: skip
    mixing_temperature: float | None = _flag(
        None, "share of a set ~ rows ** (1 / this): 1 by rows, more favours small sets; unset: all texts once an epoch"
    )
    config_name: str | None = _flag(None, "model configuration: name or folder, where it is not the model's own")
    tokenizer_name: str | None = _flag(None, "tokenizer: name or folder, where it is not the model's own")
    cache_dir: str | None = _flag(None, "folder for downloaded models and for shards made from JSON lines")
    on_error: Literal["raise", "skip"] = _flag("raise", "bad line of raw JSON lines: stop, or skip it, count it and list it")
    verify_data: bool = _flag(
        True, "compare each shard's hash with the manifest before training, once per host; False: sizes only, for terabytes"
    )
    kernels: Literal["auto", "torch", "fused"] = _flag(
        "auto", "which kernels: the best that runs here, plain torch, or fused or fail"
    )
    overwrite_output_dir: bool = _flag(False, "train into an output_dir that is not empty; the checkpoints in it are removed")

    # Length of the run
    per_device_train_batch_size: int = _flag(
        8, "texts (queries with their passages, for finetune) a rank takes in one micro batch"
    )
    gradient_accumulation_steps: int = _flag(1, "micro batches in one optimizer step; adds no negatives")
    num_train_epochs: float = _flag(3.0, "passes over the data; a fraction ends within the last one")
    max_steps: int = _flag(-1, "optimizer steps of the whole run; overrides num_train_epochs unless -1")

    # Optimizer and schedule
    learning_rate: float = _flag(5e-5, "peak learning rate")
    lr_scheduler_type: str = _flag("linear", "one of " + ", ".join(SCHEDULES))
    lr_scheduler_kwargs: dict | str | None = field(
        default=None, metadata={"help": "JSON object of further arguments of the schedule; parsed, it is a dict"}
    )
    warmup_steps: float = _flag(0, "steps in which the learning rate rises from 0; below 1, a share of all steps")
    optim: str = _flag(
        "adamw_torch_fused", "adamw_torch, adamw_torch_fused, or adamw_deepspeed: its FusedAdam on a GPU, CPUAdam on a CPU"
    )
    weight_decay: float = _flag(0.0, "AdamW's weight decay; biases and norms have none")
    adam_beta1: float = _flag(0.9, "AdamW's decay of the mean of gradients")
    adam_beta2: float = _flag(0.999, "AdamW's decay of the mean of squared gradients")
    adam_epsilon: float = _flag(1e-8, "AdamW's term against division by zero")
    max_grad_norm: float = _flag(1.0, "largest norm of the whole gradient, longer ones are scaled down; 0: never")
    max_nonfinite_steps: int = _flag(
        20, "steps in a row with a loss or gradient that is not finite, each skipped and counted, that stop the run; 0: never"
    )
    average_tokens_across_devices: bool = _flag(
        True, "pretrain: mean over the tokens of all ranks, not mean of the ranks' means"
    )

    # Precision and memory
    bf16: bool = _flag(False, "train in bfloat16, fp32 master weights")
    fp16: bool = _flag(False, "train in float16 with loss scaling, fp32 master weights")
    tf32: bool | None = _flag(
        None, "TensorFloat-32 products on Ampere GPUs and later; unset: as torch has it", nargs="?", const=True
    )
    gradient_checkpointing: bool = _flag(False, "keep no activations, compute them again in the backward pass")
    gradient_checkpointing_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'JSON object, {"use_reentrant": true|false}; parsed, it is a dict'}
    )
    torch_compile: bool = _flag(
        False, "compile the layers of a backbone that runs without padding; off, as no GPU has measured a gain yet"
    )
    torch_compile_backend: Literal["inductor", "aot_eager", "eager"] | None = _flag(
        None, "with torch_compile: what compiles; unset: inductor; the others are for finding faults"
    )
    token_bucket: int | None = _flag(
        None, "with torch_compile: rows are filled up to a multiple of so many tokens, each of which is compiled; unset: 1024"
    )
    torch_empty_cache_steps: int | None = _flag(None, "give the GPU's cached memory back every so many steps; unset: never")
    use_cpu: bool = _flag(False, "train on the CPU even where there is a GPU")

    # Logging
    logging_strategy: Literal["no", "steps", "epoch"] = _flag("steps", "when a line goes to metrics.jsonl and the writers")
    logging_steps: float = _flag(10, "steps between two lines; below 1, a share of all steps")
    logging_first_step: bool = _flag(False, "log the first step too")
    logging_nan_inf_filter: bool = _flag(True, "leave losses that are NaN or infinite out of the logged means")
    include_num_input_tokens_seen: str = _flag(
        "no", "log the tokens trained on: no, all or non_padding (the same: nothing is padded)", nargs="?", const="all"
    )
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] = _flag(
        "passive", "level of the main rank's messages; passive: as the libraries have it"
    )
    log_level_replica: Literal["debug", "info", "warning", "error", "critical", "passive"] = _flag(
        "warning", "level of the other ranks' messages"
    )
    disable_tqdm: bool | None = _flag(None, "show no progress bar", nargs="?", const=True)
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "writers of the metrics beside metrics.jsonl: none, all, tensorboard, wandb, csv"},
    )
    run_name: str | None = _flag(None, "name of the run for the writers; unset: the name of output_dir")
    logging_dir: str | None = _flag(None, "folder of the writers; unset: OUTPUT_DIR/runs")

    # Saving and resuming
    save_strategy: str = _flag(
        "steps", "when a checkpoint is written: no, steps, epoch (at each epoch's end) or best (where an evaluation is)"
    )
    save_steps: float = _flag(500, "steps between two checkpoints; below 1, a share of all steps")
    save_total_limit: int | None = _flag(None, "number of checkpoints kept, the best among them; unset: all")
    save_only_model: bool = _flag(False, "checkpoints hold the model alone: small, but no run resumes from them")
    resume_from_checkpoint: str | None = _flag(
        None, "checkpoint-N folder to go on from, or auto: the latest in output_dir, if any", nargs="?", const="auto"
    )

    # Evaluating
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "folders in BEIR's form that are searched while training; the last step is evaluated always"},
    )
    eval_strategy: str = _flag("no", "no, steps or epoch; with eval_data and unset: steps, or epoch where checkpoints are")
    eval_steps: float | None = _flag(None, "steps between two evaluations; below 1, a share of all steps; unset: save_steps")
    eval_delay: float = _flag(0.0, "steps (epochs, with eval_strategy epoch) before the first evaluation")
    eval_on_start: bool = _flag(False, "evaluate the model as it is before the first step too")
    per_device_eval_batch_size: int = _flag(8, "full-length passages a rank encodes at a time; of shorter texts, more")
    load_best_model_at_end: bool = _flag(False, "the result is the best checkpoint's model, not the last step's")
    metric_for_best_model: str | None = _flag(
        None, "what the best checkpoint is best by, such as dev_Recall@100; unset: nDCG@10, the mean over the sets"
    )
    greater_is_better: bool | None = _flag(None, "True, as for every measure here", nargs="?", const=True)

    # Randomness and order
    seed: int = _flag(42, "seed of initial weights, dropout and masks")
    data_seed: int | None = _flag(None, "seed of the order and choice of texts; unset: seed")
    full_determinism: bool = _flag(False, "deterministic kernels only: slower, repeats to the bit")
    train_sampling_strategy: str = _flag(
        "random", "random (shuffled each epoch), sequential (the order of the data) or group_by_length"
    )
    group_by_length: bool = _flag(
        False, "batches of texts of similar length; the same as train_sampling_strategy group_by_length"
    )

    # Loading
    dataloader_drop_last: bool = _flag(False, "drop an epoch's last step where it is not full")
    dataloader_num_workers: int = _flag(1, "processes a rank that build batches; 0: built between steps")
    dataloader_prefetch_factor: int | None = _flag(None, "batches that each worker holds ready; unset: 2")
    dataloader_pin_memory: bool = _flag(True, "page-locked memory for faster copies to a GPU")
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = _flag(
        None, "how workers are started; unset: torch's default"
    )

    # Ranks
    deepspeed: str = _flag(
        "auto", "name of a config of ds_configs/ (zero0 ... zero3) or path of a JSON file; auto: zero1, or zero0 on one rank"
    )
    ddp_backend: Literal["nccl", "gloo", "mpi", "xccl", "hccl"] | None = _flag(None, "unset: nccl on GPUs, gloo on CPUs")
    ddp_timeout: int = _flag(1800, "seconds that a rank waits for the others in a collective before it gives up")
    join_timeout: int = _flag(60, "seconds that ranks wait for all others to start")
    local_rank: int = _flag(-1, "set by the deepspeed launcher")

    explicit: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    @classmethod
    def build(cls, **values: Any) -> "TrainArguments":
        """Arguments from field values, checked; `explicit` holds the names given. Raises ValueError."""
        args = cls(**values)
        args.explicit = frozenset(values)
        args.check()
        return args

    @property
    def save_every(self) -> int | float | None:
        """Steps between checkpoints (see `steps_from`), or None where no step but an epoch's end writes one."""
        both = self.epochs_and_steps and self.save_strategy == "epoch" and "save_steps" in self.explicit
        return self.save_steps if self.save_strategy == "steps" or both else None

    def asks(self, name: str) -> bool:
        """Whether the user gave `name` a value other than its default: only that can contradict another setting."""
        return name in self.explicit and getattr(self, name) != _default(self, name)

    def check(self) -> None:
        """Bring values into their final form and raise ValueError for any that is wrong or contradicts another."""
        check_ranges(self)
        for name in ("output_dir", "cache_dir", "logging_dir", "deepspeed", "resume_from_checkpoint"):
            if isinstance(value := getattr(self, name), str) and value.startswith("~"):
                setattr(self, name, str(Path(value).expanduser()))
        require(self.output_dir, "--output_dir is empty; give a path")
        check_data(self)
        choose(self, "save_strategy", ("no", "steps", "epoch", "best"))
        for name in ("warmup_steps", "logging_steps", "save_steps"):
            setattr(self, name, count_or_share(name, getattr(self, name)))
        seen = str(self.include_num_input_tokens_seen).lower()
        self.include_num_input_tokens_seen = {"true": "all", "false": "no"}.get(seen, seen)
        choose(self, "include_num_input_tokens_seen", ("no", "all", "non_padding"))
        resume = str(self.resume_from_checkpoint or "false")
        self.resume_from_checkpoint = {"true": "auto", "auto": "auto", "false": None, "none": None}.get(resume.lower(), resume)
        self.report_to = writers(self.report_to)
        check_optimizer(self)
        check_evaluation(self)
        check_conflicts(self)


@dataclass(kw_only=True)
class PretrainArguments(TrainArguments):
    """Flags of `python -m bge_ds.pretrain`: RetroMAE pre-training on plain texts."""

    command: ClassVar[str] = "bge_ds.pretrain"
    epochs_and_steps: ClassVar[bool] = True

    model_name_or_path: str = _flag(
        "bert-base-uncased", "model to start from: name or folder; empty: from scratch, see config_name"
    )
    max_seq_length: int = _flag(512, "tokens a text keeps, special tokens included")
    word_segmenter: Literal["none", "jieba"] = _flag("none", "words masked whole in Chinese: a character each, or jieba's")
    per_device_train_tokens: int | None = _flag(
        None, "most tokens of a rank's micro batch, which then takes whole texts while they fit; unset: a number of texts"
    )
    objective: Literal["retromae", "dupmae", "mlm"] = _flag(
        "retromae", "retromae: masked words, and a decoder that rebuilds the text from [CLS]; dupmae: and its bag of words "
        "from the other tokens; mlm: masked words alone"
    )  # fmt: skip
    bow_loss_weight: float = _flag(0.1, "with objective dupmae: weight of the bag of words beside the two other losses")
    encoder_mlm_probability: float = _flag(0.3, "share of the encoder's tokens that are masked, by whole words")
    decoder_mlm_probability: float = _flag(0.5, "share of the words hidden from each row of the decoder")
    decoder_query: Literal["embeddings", "raw"] = _flag(
        "embeddings", "decoder's query stream: through the encoder's embedding module, or the raw h + p_i of the paper"
    )
    save_strategy: str = _flag(
        "epoch", "no, steps, epoch or best; with epoch, a save_steps that is given saves every so many steps too"
    )

    def check(self) -> None:
        """As for both commands, and: a model from scratch needs a configuration and a tokenizer."""
        super().check()
        for name, needs, has_effect in (
            ("bow_loss_weight", "--objective dupmae", self.objective == "dupmae"),
            ("decoder_mlm_probability", "a decoder: --objective retromae or dupmae", self.objective != "mlm"),
            ("decoder_query", "a decoder: --objective retromae or dupmae", self.objective != "mlm"),
        ):
            require(
                has_effect or not self.asks(name),
                f"--{name} {getattr(self, name)} has no effect without {needs}; change that or drop --{name}",
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
class FinetuneArguments(TrainArguments):
    """Flags of `python -m bge_ds.finetune`: contrastive fine-tuning on queries with positives and negatives."""

    command: ClassVar[str] = "bge_ds.finetune"

    model_name_or_path: str = field(metadata={"help": "model to start from: name or folder"})
    train_group_size: int = _flag(8, "passages a query brings: one positive, the others its own negatives")
    query_max_len: int = _flag(32, "tokens a query keeps, instruction and special tokens included")
    passage_max_len: int = _flag(128, "tokens a passage keeps, instruction and special tokens included")
    max_example_num_per_dataset: int = _flag(
        100_000_000, "groups taken from each input file, a random subsample of a longer one"
    )
    same_dataset_within_batch: bool = _flag(
        False, "all queries of a step, on all ranks, come from one input file, so that negatives are of the same kind"
    )
    query_instruction_for_retrieval: str | None = _flag(None, "prefix of every query, saved as the model's query prompt")
    passage_instruction_for_retrieval: str | None = _flag(None, "prefix of every passage, saved as the model's passage prompt")
    sub_batch_size: int | None = _flag(
        None, "texts (queries and passages) computed at a time: the same gradient in less memory (GradCache); unset: all"
    )
    sub_batch_tokens: int | None = _flag(None, "the same, as tokens at a time: more even pieces where texts differ in length")
    negatives_cross_device: bool = _flag(False, "the passages of all ranks are negatives, not only the rank's own")
    use_inbatch_neg: bool = _flag(True, "the other queries' passages are negatives too")
    bidirectional: bool = _flag(False, "also score each positive against all queries; the loss is the mean of both ways")
    mask_false_negatives: bool = _flag(True, "a passage whose text equals the query's positive is no negative of it")
    false_negative_margin: float | None = _flag(
        None, "a passage more similar than the positive by more than this is no negative; may be below 0; unset: off"
    )
    false_negative_margin_type: Literal["absolute", "relative"] = _flag(
        "absolute", "the margin is a similarity, or a share of the positive's"
    )
    temperature: float = _flag(0.02, "divides the similarities; always 1 where vectors are not normalised")
    learnable_temperature: bool = _flag(False, "train the temperature too, from --temperature on")
    knowledge_distillation: bool = _flag(False, "learn from a teacher's scores: pos_scores and neg_scores of the data")
    kd_loss_type: Literal["kl_div", "m3_kd_loss", "margin_mse"] = _flag(
        "kl_div", "kl_div and margin_mse are added to the contrastive loss, m3_kd_loss replaces it"
    )
    use_mrl: bool = _flag(False, "Matryoshka: the mean of the loss over prefixes of the vectors")
    mrl_dims: list[int] = field(
        default_factory=list, metadata={"help": "with use_mrl: the prefixes' lengths, such as 64 128 256 768"}
    )
    normalize_embeddings: bool = _flag(True, "vectors of length 1; also spelled normlized")
    sentence_pooling_method: Literal["cls", "mean", "last_token"] = _flag("cls", "how a text's vector is made of its tokens'")
    bidirectional_attention: bool = _flag(
        False, "decoder backbones: every token sees the whole text, not only what is before it"
    )
    fix_position_embedding: bool = _flag(False, "do not train parameters whose name contains position_embeddings")

    # LoRA
    use_lora: bool = _flag(False, "train low-rank adapters of linear layers alone; saved merged, and by themselves for peft")
    lora_rank: int = _flag(64, "with use_lora: rank of an adapter's matrices")
    lora_alpha: float = _flag(16.0, "with use_lora: an adapter's product is multiplied by lora_alpha / lora_rank")
    lora_dropout: float = _flag(0.1, "with use_lora: dropout of an adapter's input")
    target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "with use_lora: names of the linear layers that get an adapter, such as query value; unset: all"},
    )

    def check(self) -> None:
        """As for both commands, and: the temperature fits the similarity, and there is something to compare against."""
        super().check()
        for name in ("query_instruction_for_retrieval", "passage_instruction_for_retrieval"):
            setattr(self, name, getattr(self, name) or None)
        require(self.model_name_or_path, "--model_name_or_path is empty; give the name or the folder of an encoder")
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
            self.average_tokens_across_devices,
            "--average_tokens_across_devices False is refused: the loss is the mean over the queries of all ranks",
        )
        require(
            self.use_inbatch_neg or not self.negatives_cross_device,
            "--negatives_cross_device and --use_inbatch_neg False exclude each other: without in-batch negatives no "
            "other query's passage is compared; drop one of them",
        )
        check_objective(self)
        check_lora(self)
        alone = not self.use_inbatch_neg or (self.per_device_train_batch_size == 1 and not self.negatives_cross_device)
        require(
            self.train_group_size > 1 or not alone,
            "--train_group_size 1 leaves each query its positive and nothing to compare it against; raise it, or take "
            "in-batch negatives (--use_inbatch_neg True with --per_device_train_batch_size above 1)",
        )


def steps_from(value: int | float, total_steps: int) -> int:
    """Steps meant by a count-or-share field: a value below 1 is a share of `total_steps`, rounded up; else itself."""
    return math.ceil(value * total_steps) if value < 1 else int(value)


def describe(args: TrainArguments) -> list[tuple[str, Any]]:
    """Every setting in effect as (name, value), in the order of the help."""
    hidden = ("explicit", "local_rank")
    return [(f.name, getattr(args, f.name)) for f in dataclasses.fields(args) if f.name not in hidden]


def changed(args: TrainArguments) -> list[tuple[str, Any, Any]]:
    """The settings in effect that differ from their default, as (name, value, default); required ones have none."""
    rows = ((name, value, _default(args, name)) for name, value in describe(args))
    return [row for row in rows if row[2] is not dataclasses.MISSING and row[1] != row[2]]


def _default(args: "TrainArguments", name: str) -> Any:
    (found,) = (f for f in dataclasses.fields(args) if f.name == name)
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()
