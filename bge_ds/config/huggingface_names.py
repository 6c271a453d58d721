"""Which names of ``transformers.TrainingArguments`` bge_ds does not take, and why.

People arrive with scripts written for ``transformers.Trainer``. Each of its names, of the 5.x versions and of the 4.x
ones, is in exactly one place: a field of the dataclasses in ``arguments.py`` (honoured), ``ALIASES`` (another name of
such a field) or ``REFUSED``. A refused name passes when its value asks for what happens anyway (``ACCEPTED``), so that
a script which spells out defaults still runs; any other value stops the run, because a setting that is dropped in
silence costs a training run before anyone notices. This file imports nothing: the tables are data.
"""

# Another name -> (the field that it sets, the type of its value).
ALIASES: dict[str, tuple[str, type]] = {
    "normlized": ("normalize_embeddings", bool),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", int),
    "no_cuda": ("use_cpu", bool),
    "activation_checkpointing": ("gradient_checkpointing", bool),
    "activation_checkpointing_kwargs": ("gradient_checkpointing_kwargs", str),
    "warmup_ratio": ("warmup_steps", float),
    "evaluation_strategy": ("eval_strategy", str),
    "push_to_hub_model_id": ("hub_model_id", str),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", int),
}

_EVALUATION = "an evaluation searches the folders of --eval_data; it has no loss, predictions or metric functions to set up"
_ASK_FOR_EVALUATION = "--eval_data FOLDER is what turns evaluation on, and --eval_steps or --eval_strategy says when"
_HUB = "the finished model is uploaded once, to the main branch"
_HUB_TOKEN = "a token on a command line can be read by others; set HF_TOKEN, or run `hf auth login`"
_TRACKIO = "Trackio is not among the writers; choose from --report_to tensorboard, wandb, csv"
_FSDP = "the engine is DeepSpeed; --deepspeed zero3 shards the parameters as FSDP does"
_DDP = "gradients are reduced by DeepSpeed, not by DistributedDataParallel; see --deepspeed"
_COMPILE = "--torch_compile compiles the layers as they are; where texts end changes each step, which CUDA graphs do not allow"
_ACCELERATE = "accelerate is not used: DeepSpeed starts the ranks and the order of the data is computed from the seed"
_LIGER = "Liger's kernels patch causal language models; --kernels auto|torch|fused chooses bge_ds's own"
_OPTIMIZER = '--optim takes AdamW only; for another optimizer write the "optimizer" section of the DeepSpeed config'
_FULL_EVAL = "texts are encoded for an evaluation in the precision of the run; see --bf16 and --fp16"
_APEX = "apex is not used: --fp16 or --bf16 chooses the precision and DeepSpeed keeps the fp32 master weights"
_TPU = "TPUs are not supported: DeepSpeed runs on GPUs and CPUs"
_LENGTH = "lengths are read from the shards, which have no columns besides; --group_by_length needs no more"
_BATCHES = "batches are built from the shards and hold exactly what the model takes"

# A group of names that share a reason -> the reason.
_GROUPS: dict[str, str] = {
    "do_eval evaluate_during_training": _ASK_FOR_EVALUATION,
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
    "include_inputs_for_metrics batch_eval_metrics jit_mode_eval use_legacy_prediction_loop": _EVALUATION,
    "bf16_full_eval fp16_full_eval": _FULL_EVAL,
    "hub_always_push hub_revision": _HUB,
    "hub_token push_to_hub_token": _HUB_TOKEN,
    "push_to_hub_organization": "it is a part of the name now: --push_to_hub --hub_model_id ORGANISATION/NAME",
    "project trackio_space_id trackio_bucket_id trackio_static_space_id": _TRACKIO,
    "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap sharded_ddp": _FSDP,
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph": _DDP,
    "torch_compile_mode": _COMPILE,
    "torchdynamo": "it is called --torch_compile --torch_compile_backend BACKEND now",
    "accelerator_config dispatch_batches split_batches": _ACCELERATE,
    "use_liger_kernel liger_kernel_config": _LIGER,
    "optim_args optim_target_modules adafactor": _OPTIMIZER,
    "fp16_opt_level half_precision_backend fp16_backend": _APEX,
    "tpu_num_cores tpu_metrics_debug": _TPU,
    "length_column_name": _LENGTH,
    "remove_unused_columns label_names": _BATCHES,
    "parallelism_config tp_size mp_parameters": "only data parallelism is offered: an encoder fits on one device, and "
    "--deepspeed zero3 shards one that does not",
}

REFUSED: dict[str, str] = {name: reason for names, reason in _GROUPS.items() for name in names.split()} | {
    "label_smoothing_factor": "labels are exact; soften a contrastive loss with --temperature, and that of a reranker with "
    "--label_smoothing",
    "use_cache": "encoders keep no cache of past keys",
    "past_index": "encoders keep no state from one batch to the next",
    "neftune_noise_alpha": "noise on embeddings serves the instruction tuning of language models; not in this version",
    "auto_find_batch_size": "the batch decides the number of negatives, so it is never changed behind your back; lower "
    "--per_device_train_batch_size or set --gradient_checkpointing",
    "log_on_each_node": "metrics come from rank 0 alone; --log_level_replica sets what the other ranks print",
    "save_on_each_node": "models are written once, by rank 0, and each rank writes its own part of a checkpoint; put "
    "--output_dir on storage that all hosts share",
    "save_safetensors": "models are always written as safetensors",
    "enable_jit_checkpoint": "a termination signal always makes a checkpoint",
    "ignore_data_skip": "a resumed run continues at the very next text, which costs nothing here",
    "restore_callback_states_from_checkpoint": "the training loops have no callbacks",
    "dataloader_in_order": "batches always arrive in the order computed from the seed, or no run could be repeated",
    "dataloader_persistent_workers": "loader workers always live for the whole run",
    "debug": "its hooks for under- and overflow are not in this version; --log_level debug prints more",
    "skip_memory_metrics": "memory is always measured",
    "do_train": "the command trains, whatever it says",
    "do_predict": "the command trains; use `python -m bge_ds.evaluate`, or sentence-transformers to embed texts",
    "include_tokens_per_second": "tokens per second are always reported",
    "use_mps_device": "DeepSpeed does not train on Apple's GPUs; use --use_cpu",
    "use_ipex": "Intel's extension is not used: torch has its own CPU kernels",
    "xpu_backend": "--ddp_backend is its name now",
    "ray_scope": "hyper-parameter search is not in this version",
    # Names that are no TrainingArguments but stand in nearly every script that has them.
    "trust_remote_code": "the padding-free forward pass needs architectures built into transformers, so models that "
    "bring code of their own are not supported",
    # Names of FlagEmbedding's trainers.
    "use_fast_tokenizer": "texts are tokenized by the core of a fast tokenizer",
    "use_slow_tokenizer": "texts are tokenized by the core of a fast tokenizer",
    "use_flash_attn": "attention is chosen by the device and the precision",
    "save_merged_lora_model": "the saved model is always merged, and the adapter lies beside it",
    "only_merge_lora_model": "the saved model is always merged, and the adapter lies beside it",
    "shuffle_ratio": "texts are tokenized once, and so cannot be shuffled; leave it out",
    "modules_to_save": "with --use_lora the adapters train alone",
    "from_peft": "merge the adapter into its model first, and give that folder",
    "peft_model_path": "merge the adapter into its model first, and give that folder",
    "raw_peft": "merge the adapters into their model first, and give that folder",
    "model_revision": "download that revision (`hf download REPO --revision R --local-dir FOLDER`) and give the folder",
}

# The values of a refused name that ask for what happens anyway. Not listed: None, False and "".
_OFF = (None, False, "")
ACCEPTED: dict[str, tuple] = {
    "eval_do_concat_batches": (True,),
    "project": ("huggingface",),
    "trackio_space_id": (None, "trackio"),
    "fsdp_min_num_params": (0,),
    "tp_size": (0, 1),
    "fp16_opt_level": ("O1",),
    "half_precision_backend": ("auto",),
    "fp16_backend": ("auto",),
    "length_column_name": ("length",),
    "remove_unused_columns": (True,),
    "label_smoothing_factor": (0,),
    "past_index": (-1,),
    "torch_compile_mode": (*_OFF, "default"),
    "log_on_each_node": (True,),
    "save_safetensors": (True,),
    "dataloader_in_order": (True,),
    "dataloader_persistent_workers": (True, False),
    "enable_jit_checkpoint": (True, False),
    "skip_memory_metrics": (True, False),
    "do_train": (True, False),
    "include_tokens_per_second": (True, False),
    "ray_scope": ("last",),
    "use_fast_tokenizer": (True,),
    "use_flash_attn": (True, False),
    "save_merged_lora_model": (True, False),
    "shuffle_ratio": (0,),
}
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def accepted(name: str) -> tuple:
    """The values with which the refused flag `name` passes."""
    return ACCEPTED.get(name, _OFF)


def refusal(name: str, given: list[str]) -> str | None:
    """Why the refused flag `name` cannot have the words `given` (none: the bare flag), or None where it may."""
    if any(_means(given, value) for value in accepted(name)):
        return None
    return f"--{name} is refused: {REFUSED[name]}"


def refusal_of_newer(name: str, given: list[str], default: object) -> str | None:
    """The same for a name that only the installed transformers knows, with the `default` that it has there."""
    if _means(given, getattr(default, "value", default)):
        return None
    return f"--{name} is refused: this setting of the installed transformers is newer than this version of bge_ds"


def _means(given: list[str], value: object) -> bool:
    text = " ".join(given).strip().lower() if given else "true"
    if value is None or value == "" or value == []:
        return text in ("", "none", "null", "[]")
    if isinstance(value, bool):
        return text in (TRUE if value else FALSE)
    if isinstance(value, int | float):
        try:
            return float(text) == value
        except ValueError:
            return False
    return text == str(value).lower()
