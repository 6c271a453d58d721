"""The flags that every training command shares: what they mean, what they may be, and which settings exclude each other.

Names are those of ``transformers.TrainingArguments`` wherever it has one; ``huggingface_names.py`` lists those of its names
that are refused. Nothing here looks at disks, devices or ranks: whether a path exists is checked by whoever opens it, since N
ranks would race to answer.
"""

import dataclasses
import math
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from bge_ds.config.validation import (
    SCHEDULES,
    check_conflicts,
    check_data,
    check_evaluation,
    check_hub,
    check_license,
    check_optimizer,
    check_ranges,
    choose,
    count_or_share,
    require,
    writers,
)

LogLevel = Literal["debug", "info", "warning", "error", "critical", "passive"]
_Arguments = TypeVar("_Arguments", bound="TrainArguments")


def flag(default: Any, text: str, **extra: Any) -> Any:
    """A field with its help text; `extra` goes to argparse. Percent signs in `text` are plain text. MISSING: required."""
    metadata = {"help": text.replace("%", "%%"), **extra}
    return field(default_factory=list, metadata=metadata) if default == [] else field(default=default, metadata=metadata)


def rare(default: Any, text: str, **extra: Any) -> Any:
    """A flag that `--help all` shows and `--help` does not."""
    return flag(default, text, rare=True, **extra)


@dataclass(kw_only=True)
class TrainArguments:
    """What both commands share. Lengths are in tokens, batches in texts or groups, steps in optimizer steps."""

    command: ClassVar[str] = "bge_ds"
    epochs_and_steps: ClassVar[bool] = False  # whether save_steps adds to save_strategy epoch
    per_device_train_tokens: ClassVar[int | None] = None  # a flag of pretrain alone

    topic_model_and_data: ClassVar[str] = "Model and data"
    output_dir: str = flag(MISSING, "folder for the model, checkpoint-N/ and metrics.jsonl")
    train_data: list[str] = field(
        metadata={"help": "shards made by bge_ds.preprocess, or JSON lines (file, folder or glob) to preprocess into a cache; "
                  "several may be given, each as PATH, or as PATH=WEIGHT to set its sampling weight"}
    )  # fmt: skip
    mixing_temperature: float | None = rare(
        None,
        "each set is sampled in proportion to rows ** (1 / this); above 1 favours small sets; unset: every text once per epoch",
    )
    config_name: str | None = rare(None, "model configuration: name or folder; unset: the model's own")
    tokenizer_name: str | None = rare(None, "tokenizer: name or folder; unset: the model's own")
    cache_dir: str | None = flag(None, "folder for downloaded models and for shards made from JSON lines")
    token: str | None = field(
        default=None, repr=False,
        metadata={"rare": True, "help": "access token of the hub, in place of HF_TOKEN; it is written nowhere, but others may "
                  "read a command line"},
    )  # fmt: skip
    on_error: Literal["raise", "skip"] = rare("raise", "on a bad JSON line: stop (raise), or skip, count and list it (skip)")
    verify_data: bool = rare(
        True, "compare each shard's hash with the manifest before training, once per host; False: sizes only, for terabytes"
    )
    kernels: Literal["auto", "torch", "fused"] = flag(
        "auto", "auto: the fastest kernels available; torch: plain torch only; fused: an error where they are not available"
    )
    overwrite_output_dir: bool = flag(False, "train into an output_dir that is not empty; the checkpoints in it are removed")

    topic_length_of_the_run: ClassVar[str] = "Length of the run"
    per_device_train_batch_size: int = flag(8, "texts (finetune: queries) in a rank's micro batch")
    gradient_accumulation_steps: int = flag(1, "micro batches in one optimizer step; adds no negatives")
    num_train_epochs: float = flag(3.0, "epochs; may be a fraction")
    max_steps: int = flag(-1, "optimizer steps of the whole run; overrides num_train_epochs unless -1")

    topic_optimizer_and_schedule: ClassVar[str] = "Optimizer and schedule"
    learning_rate: float = flag(5e-5, "peak learning rate")
    lr_scheduler_type: str = flag("linear", "one of " + ", ".join(SCHEDULES))
    lr_scheduler_kwargs: dict | str | None = rare(
        None, "JSON object of further arguments of the schedule; parsed, it is a dict"
    )
    warmup_steps: float = flag(0, "warm-up steps; below 1, a fraction of all steps")
    optim: str = flag(
        "adamw_torch_fused", "adamw_torch, adamw_torch_fused, or adamw_deepspeed: its FusedAdam on a GPU, CPUAdam on a CPU"
    )
    weight_decay: float = flag(0.0, "AdamW's weight decay; biases and norms have none")
    adam_beta1: float = rare(0.9, "AdamW's decay of the mean of gradients")
    adam_beta2: float = rare(0.999, "AdamW's decay of the mean of squared gradients")
    adam_epsilon: float = rare(1e-8, "AdamW's term against division by zero")
    max_grad_norm: float = flag(1.0, "gradient clipping: maximum norm of the whole gradient; 0: no clipping")
    max_nonfinite_steps: int = rare(
        20, "stop after this many consecutive steps skipped for a NaN or infinite loss or gradient; 0: never"
    )
    average_tokens_across_devices: bool = rare(
        True, "pretrain: mean over the tokens of all ranks, not mean of the ranks' means"
    )

    topic_precision_and_memory: ClassVar[str] = "Precision and memory"
    bf16: bool = flag(False, "train in bfloat16, fp32 master weights")
    fp16: bool = flag(False, "train in float16 with loss scaling, fp32 master weights")
    tf32: bool | None = rare(None, "TensorFloat-32 products on Ampere GPUs and later; unset: as torch has it")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass instead of storing them")
    gradient_checkpointing_kwargs: dict | str | None = rare(
        None, 'JSON object, {"use_reentrant": true|false}; parsed, it is a dict'
    )
    torch_compile: bool = rare(
        False, "compile the layers of a backbone that runs without padding; no gain has been measured on a GPU yet"
    )
    torch_compile_backend: Literal["inductor", "aot_eager", "eager"] | None = rare(
        None, "with torch_compile: backend; unset: inductor; the others are for debugging"
    )
    token_bucket: int | None = rare(
        None, "with torch_compile: packed rows are padded to a multiple of this; one compilation per multiple; unset: 1024"
    )
    torch_empty_cache_steps: int | None = rare(None, "empty the GPU's memory cache every this many steps; unset: never")
    use_cpu: bool = flag(False, "train on the CPU even where there is a GPU")

    topic_logging: ClassVar[str] = "Logging"
    logging_strategy: Literal["no", "steps", "epoch"] = flag("steps", "when metrics are logged")
    logging_steps: float = flag(10, "steps between two log lines; below 1, a fraction of all steps")
    logging_first_step: bool = rare(False, "log the first step too")
    logging_nan_inf_filter: bool = rare(True, "leave losses that are NaN or infinite out of the logged means")
    include_num_input_tokens_seen: str = rare(
        "no", "log the tokens trained on: no, all or non_padding (the same: nothing is padded)", nargs="?", const="all"
    )
    log_level: LogLevel = rare("passive", "log level of rank 0; passive: the libraries' default")
    log_level_replica: LogLevel = rare("warning", "log level of the other ranks")
    disable_tqdm: bool | None = rare(None, "show no progress bar")
    report_to: list[str] = flag([], "writers of the metrics beside metrics.jsonl: none, all, tensorboard, wandb, csv")
    run_name: str | None = rare(None, "name of the run for the writers; unset: the name of output_dir")
    logging_dir: str | None = rare(None, "folder of the writers; unset: OUTPUT_DIR/runs")

    topic_saving_and_resuming: ClassVar[str] = "Saving and resuming"
    save_strategy: str = flag(
        "steps", "when a checkpoint is written: no, steps, epoch (at each epoch's end) or best (where an evaluation is)"
    )
    save_steps: float = flag(500, "steps between two checkpoints; below 1, a fraction of all steps")
    save_total_limit: int | None = flag(None, "maximum number of checkpoints kept, the best included; unset: all")
    save_only_model: bool = rare(False, "checkpoints hold the model only: smaller, but a run cannot resume")
    resume_from_checkpoint: str | None = flag(
        None, "checkpoint-N folder to resume from, or auto: the latest in output_dir, if any", nargs="?", const="auto"
    )

    topic_uploading: ClassVar[str] = "Model card and uploading"
    license: str | None = rare(
        None, "licence of the model for its card, by the hub's name, such as apache-2.0; unset: none is said"
    )
    push_to_hub: bool = flag(
        False, "upload the finished model to the Hugging Face hub, with the token of HF_TOKEN or `hf auth login`"
    )
    hub_model_id: str | None = flag(
        None, "with push_to_hub: repository, such as ORGANISATION/NAME; unset: the name of output_dir, under the token's user"
    )
    hub_private_repo: bool | None = rare(
        None, "with push_to_hub: a repository that is made is private; unset: as the hub has it"
    )
    hub_strategy: str = rare(
        "end", "end: the model is uploaded when it is finished; every_save, transformers' default, only without push_to_hub"
    )

    topic_evaluating: ClassVar[str] = "Evaluating"
    eval_data: list[str] = flag([], "folders in BEIR's format to evaluate on while training; the last step is always evaluated")
    eval_strategy: str = flag("no", "no, steps or epoch; unset with eval_data: epoch if save_strategy is epoch, else steps")
    eval_steps: float | None = flag(None, "steps between two evaluations; below 1, a fraction of all steps; unset: save_steps")
    eval_delay: float = rare(0.0, "steps (epochs, with eval_strategy epoch) before the first evaluation")
    eval_on_start: bool = rare(False, "also evaluate before the first step")
    per_device_eval_batch_size: int = rare(8, "full-length passages per forward pass of a rank; more of shorter ones")
    load_best_model_at_end: bool = flag(False, "the result is the best checkpoint's model, not the last step's")
    metric_for_best_model: str | None = rare(
        None, "metric that selects the best checkpoint, such as dev_Recall@100; unset: mean nDCG@10 over the sets"
    )
    greater_is_better: bool | None = rare(None, "True for every metric here")

    topic_randomness_and_order: ClassVar[str] = "Randomness and order"
    seed: int = flag(42, "seed of initial weights, dropout and masks")
    data_seed: int | None = rare(None, "seed of the order and choice of texts; unset: seed")
    full_determinism: bool = rare(False, "deterministic kernels only: slower, bit-reproducible")
    train_sampling_strategy: str = rare(
        "random", "random (shuffled each epoch), sequential (the order of the data) or group_by_length"
    )
    group_by_length: bool = flag(
        False, "batches of texts of similar length; the same as train_sampling_strategy group_by_length"
    )

    topic_loading: ClassVar[str] = "Loading"
    dataloader_drop_last: bool = rare(False, "drop the last, incomplete step of an epoch")
    dataloader_num_workers: int = flag(1, "data loader processes per rank; 0: batches are built between steps")
    dataloader_prefetch_factor: int | None = rare(None, "batches prefetched by each worker; unset: 2")
    dataloader_pin_memory: bool = rare(True, "page-locked memory for faster copies to a GPU")
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = rare(
        None, "how workers are started; unset: torch's default"
    )

    topic_ranks: ClassVar[str] = "Ranks"
    deepspeed: str = flag(
        "auto", "name of a config of ds_configs/ (zero0 ... zero3) or path of a JSON file; auto: zero1, or zero0 on one rank"
    )
    ddp_backend: Literal["nccl", "gloo", "mpi", "xccl", "hccl"] | None = rare(None, "unset: nccl on GPUs, gloo on CPUs")
    ddp_timeout: int = rare(1800, "seconds that a rank waits for the others in a collective before it gives up")
    join_timeout: int = rare(60, "seconds that ranks wait for all others to start")
    local_rank: int = rare(-1, "set by the deepspeed launcher")

    explicit: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    @classmethod
    def build(cls: type[_Arguments], **values: Any) -> _Arguments:
        """Arguments from field values, checked; `explicit` holds the names given. Raises ValueError."""
        args = cls(**values)
        args.explicit = frozenset(values)
        args.check()
        return args.frozen()

    def frozen(self: _Arguments) -> _Arguments:
        """Itself, from here on without assignments (`config/run_config.py` makes changed copies)."""
        self.__dict__["_frozen"] = True
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if "_frozen" in self.__dict__:
            raise dataclasses.FrozenInstanceError(f"{name} of parsed arguments cannot be assigned")
        super().__setattr__(name, value)

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Tokens that a row's texts keep, in the order of the shards' columns."""
        raise NotImplementedError

    def rank_dependence(self) -> str | None:
        """Why another number of ranks, with the same global batches, would train otherwise; None: it would not."""
        raise NotImplementedError

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
        for name in ("output_dir", "cache_dir", "cache_path", "logging_dir", "deepspeed", "resume_from_checkpoint"):
            if isinstance(value := getattr(self, name, None), str) and value.startswith("~"):
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
        check_hub(self)
        check_license(self.license)
        check_conflicts(self)


def steps_from(value: int | float, total_steps: int) -> int:
    """Steps meant by a count-or-share field: a value below 1 is a share of `total_steps`, rounded up; else itself."""
    return math.ceil(value * total_steps) if value < 1 else int(value)


def describe(args: TrainArguments) -> list[tuple[str, Any]]:
    """Every setting in effect as (name, value), in the order of the help; a token is no setting to be shown."""
    hidden = ("explicit", "local_rank", "token")
    return [(f.name, getattr(args, f.name)) for f in dataclasses.fields(args) if f.name not in hidden]


def changed(args: TrainArguments) -> list[tuple[str, Any, Any]]:
    """The settings in effect that differ from their default, as (name, value, default); required ones have none."""
    rows = ((name, value, _default(args, name)) for name, value in describe(args))
    return [row for row in rows if row[2] is not MISSING and row[1] != row[2]]


def _default(args: "TrainArguments", name: str) -> Any:
    (found,) = (f for f in dataclasses.fields(args) if f.name == name)
    return found.default if found.default_factory is MISSING else found.default_factory()
