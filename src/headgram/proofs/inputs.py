"""Runs every attention module of a tiny model: as part of the whole if that can be run, else in its tower, else alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from headgram.proofs.calls import Call
from headgram.proofs.probe import Watch

#: Tokens per sequence: unlike any size of the tiny models, so that a product of this shape can only be the scores.
_TOKENS = 7
#: Frames and their width, where a model hears features instead of sound.
_FEATURES = (18, 8)
#: The side of a picture that no configuration states; a backbone leaves a 32nd of it, which should be several tokens.
_SIDE, _SIDE_BEFORE_BACKBONE = 28, 96
#: Tokens of another sequence, which keys come from.
_SOURCE = 9
_SEED = 0


def every_call(model: nn.Module) -> tuple[list[Call], list[str]]:
    """The products of all attention modules, and the modules that look like attention and could not be run.

    First the whole model is run, then every tower that is a model of its own, then single modules.
    """
    calls: list[Call] = []
    covered: set[str] = set()

    def run(path: str, arguments: Iterator[dict[str, Any]]) -> None:
        for inputs in arguments:
            failed = True
            with suppress(Exception), torch.no_grad(), _float64(), Watch(model, still=True) as watch:
                model.get_submodule(path)(**inputs)
                failed = False
            caught = [call for call in watch.calls if call.module not in covered and call.telling]
            new = [call for call in caught if call.complete or not failed]
            calls.extend(new)
            covered.update(call.module for call in new)
            if not _missing(model, covered, path):
                return

    for path, module in model.named_modules():
        if hasattr(module, "main_input_name") and hasattr(module, "config") and _missing(model, covered, path):
            run(path, _model_inputs(module))
    for path in _missing(model, covered, ""):
        around = path.rpartition(".")[0]  # which may hold the output projection
        if around and looks_like_attention(model.get_submodule(around)):
            run(around, _alone(model.get_submodule(around), around))
        if path in _missing(model, covered, path):
            run(path, _alone(model.get_submodule(path), path))
    return calls, _missing(model, covered, "")


@contextmanager
def _float64() -> Iterator[None]:
    """What a model makes by itself is as exact as its weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def attention_modules(model: nn.Module, below: str = "") -> list[str]:
    """The innermost modules that are called attention and hold weights."""
    found = [
        path
        for path, module in model.named_modules()
        if looks_like_attention(module)
        and (path == below or path.startswith(f"{below}." if below else ""))
        and sum(weight.dim() >= 2 for weight in module.parameters()) >= 2
    ]
    return [path for path in found if not any(other.startswith(f"{path}.") for other in found)]


def _missing(model: nn.Module, covered: set[str], below: str) -> list[str]:
    """The modules that look like attention, and of which nothing was caught."""
    return [
        path
        for path in attention_modules(model, below)
        if not any(ran == path or ran.startswith(f"{path}.") or path.startswith(f"{ran}.") for ran in covered)
    ]


def attention_only(model: nn.Module, calls: list[Call]) -> list[Call]:
    """The calls of softmax attention.

    Other products are left out: the likeness of a picture and a text, linear attention, the choice of one group for each piece of
    a picture, and sums over points of a picture that queries alone choose.
    """
    named = [(call, model.get_submodule(call.module)) for call in calls]
    return [
        call
        for call, module in named
        if (call.reading is not None or looks_like_attention(module)) and not _is_of_another_kind(module)
    ]


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a module is called attention, and not one that takes no softmax of products of queries and keys."""
    return bool(re.search(r"Attention|Attn|MLA", type(module).__name__)) and not _is_of_another_kind(module)


def _is_of_another_kind(module: nn.Module) -> bool:
    return bool(re.search("Lightning|DeltaAttention|AssignAttention|DeformableAttention", type(module).__name__))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(_SEED + len(shape)), dtype=torch.float64)


def _ids() -> Tensor:
    return torch.randperm(80, generator=torch.Generator().manual_seed(_SEED))[None, :_TOKENS] + 5


def _size(config: Any, *names: str, default: int) -> Any:
    for one in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        for name in names:
            value = getattr(one, name, None)
            if value is not None:
                return value
    return default


def _model_inputs(module: Any) -> Iterator[dict[str, Any]]:
    """What a model may be given, by the names of its arguments; the likeliest first."""
    config = module.config
    accepted = inspect.signature(module.forward).parameters
    side = _SIDE_BEFORE_BACKBONE if getattr(config, "backbone_config", None) else _SIDE
    image = _size(config, "image_size", "img_size", default=side)
    image = image if isinstance(image, int) else image[0] if isinstance(image, list | tuple) else side
    patch = _size(config, "patch_size", default=14)
    patch = patch if isinstance(patch, int) else patch[0]
    channels = _size(config, "num_channels", "in_channels", default=3)
    channels = channels if isinstance(channels, int) else 3
    frames = _size(config, "num_frames", default=2)
    mels = _size(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", default=8)
    positions = getattr(config, "max_source_positions", None)
    ids = {"input_ids": _ids()}
    decoder = {"decoder_input_ids": _ids()} if "decoder_input_ids" in accepted else {}
    embeds = _noise(1, _TOKENS, _size(config, "hidden_size", "d_model", default=48))
    source = {"encoder_hidden_states": _noise(1, _SOURCE, embeds.shape[-1])} if "encoder_hidden_states" in accepted else {}
    pictures = [
        _noise(1, channels, image, image),
        _noise(1, frames, channels, image, image),
        _noise(1, 4, channels * patch * patch),
        _noise(4, channels * patch * patch),
        _noise(4, channels * 2 * patch * patch),
        _noise(4, channels, patch, patch),
    ]
    grids = {
        "grid_thw": torch.tensor([[1, 2, 2]]),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "image_sizes": torch.tensor([[image, image]]),
        "spatial_shapes": torch.tensor([[2, 2]]),
        "pixel_attention_mask": torch.ones(1, 4, dtype=torch.long),
        "image_position_ids": torch.zeros(1, 4, 2, dtype=torch.long),
        "pixel_position_ids": torch.zeros(1, 4, 2, dtype=torch.long),
    }
    grids = {name: value for name, value in grids.items() if name in accepted}
    required = {name for name, one in accepted.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
    sounds = [_noise(1, mels, 2 * positions if positions else 36), _noise(1, 36, mels), _noise(1, 200), _noise(1, 1, 400)]
    if "bbox" in accepted:
        ids["bbox"] = torch.randint(1, 9, (1, _TOKENS, 4), generator=torch.Generator().manual_seed(_SEED)).cumsum(-1)
    if "visual_feats" in accepted:
        ids |= {
            "visual_feats": _noise(1, _SOURCE, config.visual_feat_dim),
            "visual_pos": _noise(1, _SOURCE, config.visual_pos_dim),
        }
    if "input_ids" in accepted:
        yield {**ids, **decoder, **source}
        yield {**ids, **source}
        for picture in pictures[:2]:
            if "pixel_values" in accepted:
                yield {**ids, "pixel_values": picture}
        yield {**ids, "decoder_input_ids": ids["input_ids"]}
    for name in ("pixel_values", "pixel_values_videos", "hidden_states", "images", "pixel_values_images"):
        if name in accepted:
            for picture in pictures:
                yield {name: picture, **{key: value for key, value in grids.items() if key in required}}
                if set(grids) - required:
                    yield {name: picture, **grids}
    for name in ("input_features", "input_values", "input_audio", "inputs", "features"):
        if name in accepted:
            for sound in sounds:
                masks = {key: torch.ones(1, sound.shape[1], dtype=torch.bool) for key in required if "mask" in key}
                yield {name: sound, **decoder, **masks}
                yield {name: sound, "attention_mask": torch.ones(1, sound.shape[1], dtype=torch.long)}
    for name in ("inputs_embeds", "hidden_states", "query_embeds"):
        if name in accepted:
            yield {name: embeds, **source}


def _alone(module: nn.Module, path: str) -> Iterator[dict[str, Any]]:
    """What a single attention module may be given, by the names of its arguments."""
    accepted = inspect.signature(module.forward).parameters
    widths = list(dict.fromkeys(weight.shape[-1] for name, weight in module.named_parameters() if weight.dim() == 2))
    rank = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None) or 12
    rank = rank if isinstance(rank, int) else 12
    first = next(iter(accepted))
    name = next((name for name in ("hidden_states", "hidden_state", "query", "queries") if name in accepted), first)
    for width in widths:
        for tokens in ((1, _TOKENS), (_TOKENS,), (1, 1, _TOKENS)):
            inputs: dict[str, Any] = {name: _noise(*tokens, width)}
            for other in ("key", "value", "keys", "values", "key_states", "value_states"):
                if other in accepted and accepted[other].default is accepted[other].empty:
                    source = _noise(*tokens[:-1], _SOURCE, width)
                    inputs[other] = source if other.startswith("key") else source + 1
            flat = torch.ones(*tokens, rank, dtype=torch.float64)
            places = _noise(1, *tokens, width)[0]  # unlike the tokens
            distances = torch.zeros(1, 2 * _TOKENS - 1, width, dtype=torch.float64)
            known: dict[str, list[Any]] = {
                "position_embeddings": [
                    (flat, flat * 0),
                    (flat[0], flat[0] * 0),
                    torch.ones(1, _TOKENS, rank // 2, dtype=torch.complex128),
                    distances,
                    places,
                ],
                "relative_position_embeddings": [distances],
                "object_queries": [places],
                "cu_seqlens": [torch.tensor([0, _TOKENS], dtype=torch.int32)],
                "position_ids": [torch.zeros(1, _TOKENS, dtype=torch.long)],
                "max_seqlen": [_TOKENS],
                "seq_len": [_TOKENS],
            }
            choices: list[dict[str, Any]] = [inputs]
            for argument, values in known.items():
                if argument in accepted:
                    choices = [{**choice, argument: value} for choice in choices for value in values]
            for argument, one in accepted.items():
                if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty and argument not in {**known, **inputs}:
                    choices = [{**choice, argument: None} for choice in choices]
            sources = [
                key
                for key in ("key_value_states", "encoder_hidden_states", "cross_attention_states", "context")
                if key in accepted
            ]
            crossed = [
                {**choice, key: _noise(1, _SOURCE, other)} for choice in choices for key in sources[:1] for other in widths
            ]
            cross_first = re.search(r"cross|enc_?dec|encoder_attn|encoder_attention", f"{path} {type(module).__name__}".lower())
            yield from [*crossed, *choices] if cross_first else [*choices, *crossed]


def inputs_of(model: Any, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the model is run on: distinct tokens that all sit at position 0."""
    config = model.config
    generator = torch.Generator().manual_seed(_SEED)
    names = set(entry.get("inputs", [model.main_input_name]))
    accepted = inspect.signature(model.forward).parameters

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs: dict[str, Tensor] = {}
    if "input_ids" in names:
        inputs["input_ids"] = torch.randperm(90, generator=generator)[None, :_TOKENS] + 5
        if "position_ids" in accepted:
            inputs["position_ids"] = torch.zeros(1, _TOKENS, dtype=torch.long)
    if "pixel_values" in names:
        vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
        inputs["pixel_values"] = noise(1, 3, vision.image_size, vision.image_size)
    if "input_values" in names:
        inputs["input_values"] = noise(1, entry.get("sound", 200))
    if "input_features" in names:
        inputs["input_features"] = noise(1, *entry.get("features", _FEATURES))
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randperm(90, generator=generator)[None, :_TOKENS] + 5
    return {name: value for name, value in inputs.items() if name in accepted}
