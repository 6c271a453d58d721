"""What the package relies on of DeepSpeed that its documentation does not promise: (owner, attributes, why).

owner: a module below `deepspeed`, and a class in it. Only this folder may use them. A test holds the list against the installed
version and against the code, so that a new version of DeepSpeed fails there and not in a run.
"""

_PARAMETER = "runtime.zero.partition_parameters"  # sets its attributes on each parameter
_FRAGMENT = "utils.tensor_fragment:tensor_fragment"
_FUSED, _UNFUSED = "runtime.fp16.fused_optimizer:FP16_Optimizer", "runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer"
_BF16 = "runtime.bf16_optimizer:BF16_Optimizer"
_ZERO = "runtime.base_optimizer:ZeROOptimizer"
_ZERO_1_2 = "runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_ZERO_3 = "runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_ENGINE = "runtime.engine:DeepSpeedEngine"
_SCALER = "runtime.fp16.loss_scaler:DynamicLossScaler"

INTERNALS = (
    # Where the optimizer state lies (optimizer_state.py).
    (_UNFUSED, ("fp16_groups", "fp32_groups"), "ZeRO 0 in 16 bits: parameters and their masters"),
    (_FUSED, ("fp16_groups", "fp32_groups_flat"), "the same, one flat master a group"),
    (_BF16, ("fp32_groups_flat_partition", "update_lp_params"), "this rank's masters; weights from masters"),
    (_ZERO_1_2, ("single_partition_of_fp32_groups", "update_lp_params"), "this rank's masters; weights from masters"),
    ("utils.mixed_precision_linkage", ("_hp_mapping",), "ZeRO 1 and 2: which part of a parameter this rank has"),
    (_FRAGMENT, ("lp_fragment_address", "hp_fragment_address", "param_group_index"), "where that part begins"),
    (_ZERO_3, ("grad_position", "get_param_id"), "which part of which master a parameter's share is"),
    (_ZERO_3, ("fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat"), "this rank's masters and weights"),
    (_ZERO_3, ("offload_optimizer", "subgroup_to_device", "backup_optimizer"), "a second optimizer where offload is partial"),
    (_ZERO_3, ("swap_optimizer", "params_in_nvme_and_cpu"), "state on NVMe is not reached, and refused"),
    (_ZERO_3, ("_unflatten_partitioned_parameters", "persistent_parameters"), "weights from masters after a load"),
    (_ZERO_3, ("checkpoint_event_prologue", "checkpoint_event_epilogue"), "no weight is gathered during a load"),
    (_PARAMETER, ("ds_id", "ds_numel", "ds_shape", "ds_tensor", "ds_process_group", "partition"), "sharded parameters"),
    ("ops.adam.cpu_adam:DeepSpeedCPUAdam", ("fp32_optimizer_states",), "the type of the moments"),
    (_ENGINE, ("global_steps", "skipped_steps", "global_samples", "micro_steps"), "counters, set by a load"),
    (_SCALER, ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"), "the loss scale, set by a load"),
    (_FUSED, ("loss_scale_config",), "the loss scale at ZeRO 0"),
    (_UNFUSED, ("loss_scale_config",), "the loss scale at ZeRO 0"),
    (_ZERO_1_2, ("loss_scaler",), "the loss scale"),
    (_ZERO_3, ("loss_scaler",), "the loss scale"),
    # What a step does (corrections.py).
    (_SCALER, ("raise_error_at_min_scale",), "how many steps may be skipped is ours to say"),
    ("runtime.utils", ("is_invalid_grad_norm",), "a version that has it skips what is not finite by itself"),
    (_ZERO_1_2, ("check_grad_overflow", "overflow"), "older ones skip what is not finite where it is set"),
    (_ZERO_3, ("_get_norm_groups", "_overflow_check_and_loss_scale_update", "overflow"), "the norms before the step"),
    (_ENGINE, ("clip_fp32_gradients",), "ZeRO 0 in fp32: our step clips"),
    (_UNFUSED, ("_global_grad_norm", "loss_scale"), "the norm of the last step, as it was scaled"),
    (_FUSED, ("_global_grad_norm", "loss_scale"), "the norm of the last step"),
    (_ZERO, ("scale_if_loss",), "where it is missing, losses are not scaled"),
    (_ZERO_1_2, ("scaled_global_norm",), "the norm is brought to the host once"),
    # The engine (engine.py).
    (_ZERO_1_2, ("_coalesce_grad_reduction",), "has `coalesce_grad_reduction` for many passes a step"),
    (_ZERO_3, ("_coalesce_grad_reduction",), "has `coalesce_grad_reduction` for many passes a step"),
    ("comm.comm", ("cdb",), "the backend whose collectives are timed"),
    ("ops", ("__compatible_ops__",), "leaves out an operation that need not be compiled"),
)
