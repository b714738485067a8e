"""Weights in the formats of compressed-tensors, against its own library."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import llama_tensors
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from quantised_files import OUT, SIZES, K, Q, V, assert_means, is_attention, quantised, write
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headgram.checkpoints.known import open_checkpoint
from headgram.errors import HeadgramError

COMPRESSED = {
    "int4 groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": True}),
    "int4 groups with zeros": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int3 channels": ("pack-quantized", {"num_bits": 3, "strategy": "channel", "symmetric": True}),
    "int8 channels": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
    "fp8 channels": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}),
    "fp8 blocks": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
}


def packed(*targets: str, bits: int) -> tuple[QuantizationScheme, dict[str, Tensor], dict[str, Tensor]]:
    """A scheme of integers with a scale for each row, a checkpoint whose attention is packed by it, and what that means."""
    args = QuantizationArgs(num_bits=bits, strategy="channel", symmetric=True)
    scheme = QuantizationScheme(targets=list(targets), weights=args, format="pack-quantized")
    library = BaseCompressor.get_value_from_registry("pack-quantized")

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
        parts = library.compress({"weight": weight, "weight_scale": scale}, scheme)
        return parts, library.decompress(parts, scheme)["weight"]

    return scheme, *quantised(quantise)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(tmp_path, kind):
    format_name, arguments = COMPRESSED[kind]
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format_name)
    library = BaseCompressor.get_value_from_registry(format_name)

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        shaped = {
            "group": weight.reshape(rows, -1, args.group_size or 1),
            "channel": weight.unsqueeze(1),
            "tensor": weight.reshape(1, 1, -1),
            "block": weight.reshape(rows // 128, 128, columns // 128, 128).transpose(1, 2).flatten(2)
            if rows % 128 == 0
            else weight,
        }[args.strategy]
        scale, zero = calculate_qparams(shaped.amin(-1), shaped.amax(-1), args)
        if args.strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        state = {"weight": weight, "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
        parts = library.compress(state, scheme)
        if arguments.get("symmetric", True):
            parts.pop("weight_zero_point", None)
        exact = parts | {"weight_scale": parts["weight_scale"].float()}
        return parts, library.decompress(exact, scheme)["weight"]

    tensors, meaning = quantised(quantise)
    settings = QuantizationConfig(config_groups={"group_0": scheme}, format=format_name).model_dump(mode="json")
    assert settings["quant_method"] == "compressed-tensors"
    assert_means(write(tmp_path, tensors, settings), meaning, word="compressed-tensors")
    for weight, original in ((meaning[name], tensor) for name, tensor in llama_tensors(**SIZES).items() if name in meaning):
        assert (weight - original.float()).norm() < 0.35 * original.float().norm()


@pytest.mark.parametrize(("kind", "group"), [("nvfp4-pack-quantized", 16), ("mxfp4-pack-quantized", 32)])
def test_compressed_tensors_in_4bit_floats(tmp_path, kind, group):
    strategy = "tensor_group" if group == 16 else "group"
    args = QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=kind)
    library = BaseCompressor.get_value_from_registry(kind)

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        grouped = weight.unflatten(1, (-1, group))
        if group == 16:
            whole = generate_gparam(weight.amin(), weight.amax())
            scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale=whole)
            state = {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}
        else:
            scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            state = {"weight": weight, "weight_scale": 2.0 ** scale.log2().ceil()}
        parts = library.compress(state, scheme)
        decoded = library.decompress(parts, scheme)["weight"].float()
        assert (decoded - weight).norm() < 0.2 * weight.norm()
        return parts, decoded

    tensors, meaning = quantised(quantise)
    settings = QuantizationConfig(config_groups={"group_0": scheme}, format=kind).model_dump(mode="json")
    assert_means(write(tmp_path, tensors, settings), meaning)


def test_compressed_tensors_as_a_model_is_saved(tmp_path):
    """A Llama that the library compressed and transformers saved, against what the library makes of the saved model."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=64, vocab_size=16, **sizes))
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="frozen", format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.model.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.data.unflatten(1, (-1, 32))
            module.weight_scale.data.copy_(calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)[0])
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    compressor.decompress_model(model)
    assert_means(tmp_path, {name: tensor for name, tensor in model.state_dict().items() if is_attention(name)})


def by_groups(*schemes: QuantizationScheme) -> dict:
    groups = {f"group_{i}": scheme for i, scheme in enumerate(schemes)}
    return QuantizationConfig(config_groups=groups, format="pack-quantized").model_dump(mode="json")


@pytest.mark.parametrize("wide", ["Linear", "re:.*_proj"])
@pytest.mark.parametrize("first", [True, False])
def test_of_several_groups_the_one_that_names_a_module_most_closely_counts(tmp_path, wide, first):
    """As in the library, whichever group stands first."""
    names = [part.format(layer) for layer in range(2) for part in (Q, K, V, OUT)]
    own, tensors, meaning = packed(*(names if wide != "Linear" else ["re:.*self_attn.*"]), bits=8)
    other, _, _ = packed(wide, bits=4)
    assert_means(write(tmp_path, tensors, by_groups(*((own, other) if first else (other, own)))), meaning)


@pytest.mark.parametrize("expression", ["re:(.*)*x", f"re:{'.*' * 9}x", f"re:{'.*' * 99}", f"re:{'a?' * 30}", "re:.*nobody"])
def test_expressions_that_take_for_ever_or_name_nothing_are_refused(tmp_path, expression):
    """Also of several groups; one alone is taken without a search."""
    own, tensors, meaning = packed(expression, bits=8)
    other, _, _ = packed("re:.*nobody", bits=4)
    assert_means(write(tmp_path, tensors, by_groups(own)), meaning)
    words = "no group in config_groups names it" if expression == "re:.*nobody" else "costly to search for"
    with (
        open_checkpoint(write(tmp_path, tensors, by_groups(own, other))) as checkpoint,
        pytest.raises(HeadgramError, match=words),
    ):
        checkpoint.qk("self", 0)


def test_integers_of_other_bits_than_the_configuration_says_are_refused(tmp_path):
    _, tensors, _ = packed("Linear", bits=8)
    wrong, _, _ = packed("Linear", bits=4)
    with open_checkpoint(write(tmp_path, tensors, by_groups(wrong))) as checkpoint, pytest.raises(HeadgramError, match="4 bits"):
        checkpoint.qk("self", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"format": "dense", "quantization_status": "frozen"}])
def test_weights_that_lie_unrounded_beside_their_scales_are_refused(tmp_path, dtype, more):
    """As llm-compressor saves them with `save_compressed=False`: they would be multiplied by the scales."""
    test_compressed_tensors(tmp_path, "fp8 blocks")
    tensors = load_file(tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    plain = {name: tensor.to(dtype) if is_attention(name) else tensor for name, tensor in tensors.items()}
    write(tmp_path, plain, settings | more)
    with pytest.raises(HeadgramError, match="beside their scales"):
        open_checkpoint(tmp_path)


def test_rotated_and_reordered_weights_are_refused(tmp_path):
    tensors = llama_tensors(**SIZES) | {f"{Q.format(0)}.weight_scale": torch.ones(1)}
    for extra, settings in (
        ({f"{Q.format(0)}.weight_g_idx": torch.ones(1)}, {}),
        ({}, {"transform_config": {"config_groups": {}}}),
    ):
        write(tmp_path, tensors | extra, {"quant_method": "compressed-tensors", **settings})
        with pytest.raises(HeadgramError, match="rotated"):
            open_checkpoint(tmp_path)
