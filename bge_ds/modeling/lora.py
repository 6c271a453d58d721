"""LoRA (arXiv:2106.09685) by peft: inject adapters into a backbone in place, merge them into its weights, save them alone.

The backbone keeps its class, config and forward, so it runs without padding as before. Only the adapters train. Merging works
on weights by name: the live model, which may be sharded or in 16 bits, is not touched.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

FOLDER = "lora_adapter"  # beside the merged model; peft loads it onto the base model
_ADAPTER = "default"  # peft's name for a model's one adapter
_UNUSED = "pooler"  # transformers' head over the first token; embeddings do not use it


def _peft():
    """Imported on use: an optional dependency."""
    try:
        import peft
    except ImportError as error:
        raise ValueError("--use_lora needs the package peft; install it with `pip install bge_ds[lora]`") from error
    return peft


def add_adapters(
    backbone: nn.Module, *, rank: int, alpha: float, dropout: float, target_modules: list[str], name_or_path: str
) -> None:
    """Add an adapter to every targeted linear layer and freeze everything else.

    target_modules: layer names or suffixes of them; empty for all linear layers. name_or_path: of the base model, for the
    adapter's config. Draws the same random numbers on every rank.
    """
    peft = _peft()
    names = sorted(name for name, module in backbone.named_modules() if isinstance(module, nn.Linear))
    names = [name for name in names if name.split(".")[0] != _UNUSED]
    # The last part of a name selects that layer in every block; a mere number would select nothing meaningful.
    valid = sorted({name if name.rsplit(".", 1)[-1].isdigit() else name.rsplit(".", 1)[-1] for name in names})
    unknown = [t for t in target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unknown or not names:
        raise ValueError(
            f"--target_modules {' '.join(unknown)}: {type(backbone).__name__} has no linear layer of that name; it has "
            f"{', '.join(valid) or 'none, so it cannot be trained with --use_lora'}"
        )
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(target_modules or valid),
        exclude_modules=rf"{_UNUSED}(\..*)?" if hasattr(backbone, _UNUSED) else None,
        task_type="FEATURE_EXTRACTION", base_model_name_or_path=str(name_or_path),
    )  # fmt: skip
    peft.inject_adapter_in_model(config, backbone, adapter_name=_ADAPTER)


def merge(backbone: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the stock model's names: W + scale * B A in fp32 for adapted layers, the others unchanged."""
    merged = {name.replace(".base_layer.", "."): w for name, w in weights.items() if not _is_adapter(name)}
    for name, down_RI in weights.items():
        layer, end, _ = name.partition(f".lora_A.{_ADAPTER}.weight")
        if end:
            up_OR = weights[f"{layer}.lora_B.{_ADAPTER}.weight"]
            scale = backbone.get_submodule(layer).scaling[_ADAPTER]
            merged[f"{layer}.weight"] = torch.addmm(merged[f"{layer}.weight"], up_OR, down_RI, alpha=scale)
    return merged


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def save_adapter(backbone: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `folder` as `PeftModel.from_pretrained(base_model, folder)` reads it; `weights` as for `merge`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = backbone.peft_config[_ADAPTER]
    config = type(config)(**{**config.to_dict(), "inference_mode": True})
    config.save_pretrained(folder)
    own = {f"base_model.model.{n.replace(f'.{_ADAPTER}.', '.')}": w.contiguous() for n, w in weights.items() if _is_adapter(n)}
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
