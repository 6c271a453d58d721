"""The only importer of deepspeed: config, building the engine, one gradient reduction a step, whole weights."""
