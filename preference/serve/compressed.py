"""Linear weights in 8 or 4 bits, in the format of compressed-tensors: what vLLM and SGLang load as it is.

Rounded to the nearest without calibration data: `fp8` has a scale per output channel and rounds activations as they
come, token by token; `w4a16` has a scale per group of 128 inputs. Embedding and output head stay as they are.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preference.errors import PreferenceError
from preference.serve.merging import Difference, Probes, difference, logits_of

PRESETS = {"fp8": "FP8_DYNAMIC", "w4a16": "W4A16"}
GROUPS = (128, 64, 32)  # inputs that share a scale, the largest that divides all layers; kernels know these
MOSTLY = 0.5  # least share of a model's inner weights that are linear layers


class CompressionError(PreferenceError, RuntimeError):
    """Weights that cannot be compressed; str() says why, and what to export instead."""


def check_package() -> None:
    """Raises CompressionError where the library is not installed."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise CompressionError("--compressed needs its package, which is not there: pip install compressed-tensors")


def save_compressed(
    model: Any, scheme: str, folder: Path, probes: Probes, max_shard_size: str
) -> tuple[str, Difference]:
    """Write `model`, of 16-bit weights, into `folder` with its linear layers as `scheme`; the model is used up.

    Returns:
        What the layers are now, in words, and how far that takes the model from what it was, computed in float32.

    Raises:
        CompressionError: its weights are not in linear layers, or their widths have no common group.
    """
    from compressed_tensors.compressors import ModelCompressor, compress_module, decompress_module
    from compressed_tensors.quantization import QuantizationStatus, apply_quantization_config

    linear = linear_layers(model)
    head = [name for name, layer in model.named_modules() if layer is model.get_output_embeddings()]
    config, words = _config(scheme, linear, head)
    dtype = model.dtype
    before_NV = logits_of(model.float(), probes)
    apply_quantization_config(model.to(dtype), config, show_progress=False)
    for layer in linear.values():
        _set_scales(layer)
    compressor = ModelCompressor.from_pretrained_model(model)  # finds the format of the layers
    for layer in linear.values():
        compress_module(layer)
    compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    compressor.update_config(str(folder))
    model.float()  # the scales too: layers are unfolded to what they stand for, not to the 16-bit number next to it
    for layer in linear.values():
        decompress_module(layer)
    return words, difference(before_NV, logits_of(model, probes))


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """All but the output head, by name. Raises CompressionError where the weights are mostly elsewhere."""
    outside = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    layers = [(name, layer) for name, layer in model.named_modules() if id(layer) not in outside]
    found = {name: layer for name, layer in layers if isinstance(layer, nn.Linear)}
    total = sum(weight.numel() for _, layer in layers for weight in layer.parameters(recurse=False))
    if sum(layer.weight.numel() for layer in found.values()) < MOSTLY * total:
        raise CompressionError(
            f"most weights of a {model.config.model_type} are in no linear layer (experts are kept as one tensor), and "
            "would stay as they are: drop --compressed"
        )
    return found


def _config(scheme: str, linear: dict[str, nn.Linear], ignore: list[str]) -> tuple[Any, str]:
    """The library's config, and what it does in words."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    preset = preset_name_to_scheme(PRESETS[scheme], ["Linear"])
    words = "8-bit floating point, a scale per output channel, activations token by token"
    if preset.weights.group_size:
        group = next((size for size in GROUPS if all(layer.in_features % size == 0 for layer in linear.values())), None)
        if group is None:
            odd = next(name for name, layer in linear.items() if layer.in_features % GROUPS[-1])
            raise CompressionError(
                f"{odd} has {linear[odd].in_features} inputs, which fill no groups of {GROUPS[-1]}: --compressed fp8"
            )
        preset.weights.group_size = group
        words = f"4-bit integers, a scale per group of {group} inputs"
    return QuantizationConfig(config_groups={"group_0": preset}, ignore=ignore), words


@torch.no_grad()
def _set_scales(layer: Any) -> None:
    """The scales that the largest weight of each channel or group asks for."""
    from compressed_tensors.quantization.utils import calculate_qparams

    args = layer.quantization_scheme.weights
    weight = layer.weight.unflatten(-1, (-1, args.group_size)) if args.group_size else layer.weight
    keep = not args.group_size  # a channel's scale is a column, a group's an element
    scale, _ = calculate_qparams(weight.amin(-1, keepdim=keep), weight.amax(-1, keepdim=keep), args)
    layer.weight_scale.copy_(scale)
