"""The DeepSpeed settings that `--deepspeed zero0 ... zero3_offload` names; installed as `bge_ds.ds_configs`."""
