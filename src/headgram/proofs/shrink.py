"""Tiny configurations of any model type: what names of transformers' configurations mean, and how small each may be."""

from __future__ import annotations

import re
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from headgram.errors import HeadgramError

#: Sizes of three tiny models. Widths are equal in all towers, because towers are handed to each other; heads and layers differ
#: between an encoder and a decoder, and between text and other towers, so that a count tells which name it comes from.
SHAPES: tuple[dict[str, int], ...] = (
    {"width": 48, "heads": 4, "kv": 2, "rank": 12, "layers": 2, "other_heads": 2, "other_layers": 3},
    {"width": 48, "heads": 6, "kv": 1, "rank": 10, "layers": 3, "other_heads": 3, "other_layers": 2},
    {"width": 60, "heads": 3, "kv": 3, "rank": 20, "layers": 2, "other_heads": 5, "other_layers": 3},
)
#: Pattern of a name -> a size of the shape, or a number. The first that fits counts.
_RULES: tuple[tuple[str, str | int], ...] = (
    (r"(linear|mamba|ssm|gdn|index|lightning)_.*|n_mamba_heads", "keep"),
    (r"(num_)?hash_.*|num_labels|num_channels|in_channels|in_chans|num_codebooks|num_stages", "keep"),
    (r"kv_lora_rank", 20),
    (r"q_lora_rank", 24),
    (r"(qk_nope|v)_head_dim", 8),
    (r"qk_rope_head_dim", 4),
    (r".*(decoder|cross).*(num_)?(attention_)?heads", "other_heads"),
    (r".*(key_value|kv)_heads|kv_heads|kv_n_heads|num_kv_heads|multi_query_group_num", "kv"),
    (r"(.*_)?(n|num|attention|self_attention|encoder_attention)_(attention_)?heads?|heads|attention_heads|n_heads?", "heads"),
    (r".*attention_heads|.*num_heads|.*_heads", "heads"),
    (r"(attention_)?head_dim|d_kv|.*_head_dim|dim_head|attention_head_size|head_size|kv_channels", "rank"),
    (r"decoder.*layers|num_decoder_layers|.*decoder_num_(hidden_)?layers|n_decoder.*layers", "other_layers"),
    (r"(num_)?(hidden_|encoder_)?layers?|n_layers?|depth|num_blocks|.*encoder_layers|.*num_(hidden_)?layers", "layers"),
    (r"(.*_)?(intermediate|ffn|mlp|feedforward|inner)_?(hidden)?_?(size|dim|dims)|d_ff|dff|d_inner|n_inner|.*_ff", 32),
    (r"(.*_)?ffn_dim|dim_feedforward|dim_ff|ffn_hidden_size|.*feed_forward_hidden_size|.*mlp_hidden_size", 32),
    (r"hidden_size_per_layer_input|laurel_rank|altup_num_inputs", "keep"),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|emb_dim|embedding_dim|out_hidden_size)", "width"),
    (r"(.*_)?(projection_dim|projection_size|output_dim|model_dim|proj_size|proj_dim|width|project_dim)|dim", "width"),
    (r"(.*_)?vocab_size(_per_layer_input)?", 99),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_.*_position(s|_embeddings)|max_sequence_length|max_seq_len|context_length",
        64,
    ),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_routed_experts", 4),
    (r"(num_experts_per_tok|moe_k|num_experts_per_token|moe_topk|top_k)", 2),
    (r"n_group|topk_group|n_shared_experts", 1),
    (r"image_size|img_size|input_size", 28),
    (r"patch_size", 14),
    (r"num_frames", 4),
    (r"num_mel_bins|num_bins|input_feat_per_channel|input_feature_size|feature_size", 8),
    (r"num_conv_pos_embeddings", 4),
    (r"num_conv_pos_embedding_groups", 2),
    (r"upsample_groups", "width"),
    (r"num_filters", 8),
    (r"conv_channels|neck_out_channels|output_channels|subsampling_conv_channels", 16),
    (r"num_queries|num_query_tokens|num_latents|latent_query_num", 11),
)
#: What a configuration may leave out, but no model can be built without.
_NEVER_NONE = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "prediction_length": 4,
}
_LARGEST_MODEL = 20_000_000
_SEED = 0
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SPEECH = {"conv_dim": [16], "conv_stride": [25], "conv_kernel": [10]}
#: A tiny ResNet in place of an image tower that only the library timm can build. It keeps the stages that the tower names.
_WITHOUT_TIMM = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}


@dataclass(frozen=True)
class Way:
    """How a type is shrunk: the first way in which its models can be built is taken."""

    equal: bool = False  # as many key heads as query heads
    own_rank: bool = False  # ranks stay what they are, because other entries depend on them
    wide: int = 1  # by what widths are multiplied, because something divides them
    twice: bool = False  # as many heads again, because something asks for even numbers


#: Tried in this order.
WAYS = (
    Way(),
    Way(equal=True),
    Way(own_rank=True),
    Way(equal=True, own_rank=True),
    Way(wide=4),
    Way(own_rank=True, wide=4),
    Way(twice=True),
    Way(wide=8),
)


def shrunk(config_class: Any, number: int, changes: Mapping[str, Any], way: Way, other: bool = False) -> dict[str, Any]:
    """The overrides that make a configuration small, its sections included: the `number`th of `SHAPES`.

    `changes` are what a type needs besides; tables in it are sections. `other` is set in sections that are not about text.
    """
    own = {name: None if value == "null" else value for name, value in changes.items()}
    values = {**_small(config_class, SHAPES[number], way, other), **own}
    if not getattr(config_class, "sub_configs", {}):
        return values
    default = config_class()
    for name in config_class.sub_configs:
        section: Any = getattr(default, name, None)
        if getattr(section, "model_type", "") == "timm_backbone":
            values[name] = {**_WITHOUT_TIMM, "out_indices": section.out_indices, **changes.get(name, {})}
        elif hasattr(section, "sub_configs"):
            text = any(word in name for word in ("text", "decoder", "llm", "thinker", "attn"))
            inner = shrunk(type(section), number, changes.get(name, {}), way, other=not text)
            values[name] = {"model_type": section.model_type, **inner} if section.model_type else inner
    return values


def _small(config_class: Any, shape: Mapping[str, int], way: Way, other: bool) -> dict[str, Any]:
    """The overrides of the numbers of one configuration."""
    sizes = {**shape, "width": shape["width"] * way.wide}
    if way.twice:
        sizes |= {name: 2 * shape[name] for name in ("heads", "kv", "other_heads")}
    if other:
        sizes |= {"heads": shape["other_heads"], "other_heads": shape["heads"]}
        sizes |= {"layers": shape["other_layers"], "other_layers": shape["layers"]}
    if other or way.equal:
        sizes |= {"kv": sizes["heads"], "rank": sizes["width"] // sizes["heads"]}
    values: dict[str, Any] = {}
    names = {field.name for field in fields(config_class)}
    if "kv_lora_rank" in names:  # in latent attention, every head has a key of its own
        sizes["kv"] = sizes["heads"]
    for field in fields(config_class):
        if field.name in _TOKENS:
            values[field.name] = _TOKENS[field.name]
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name in _SPEECH and isinstance(default, list | tuple):
            values[field.name] = _SPEECH[field.name]
        if default is None and field.name in _NEVER_NONE:
            values[field.name] = _NEVER_NONE[field.name]
        if default is None and field.name == "head_dim" and not way.own_rank:
            values[field.name] = 4 if "qk_rope_head_dim" in names else sizes["rank"]  # in latent attention, what turns
        if isinstance(default, bool) or not isinstance(default, int):
            continue
        rule = next((rule for pattern, rule in _RULES if re.fullmatch(pattern, field.name)), "keep")
        if rule != "keep" and not (rule == "rank" and way.own_rank):
            values[field.name] = sizes[rule] if isinstance(rule, str) else rule
    return values


@cache
def tiny_data() -> dict[str, Any]:
    """What `tiny_models.toml` says."""
    return tomllib.loads((files("headgram.proofs") / "tiny_models.toml").read_text(encoding="utf-8"))


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice, which are about models that one wants to use."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def switched(model_type: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Let the tiny models of a type have the switches of a configuration, in its sections too: they may change the layout."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    types = tiny_data()["types"]
    before = types.get(model_type, {})
    types[model_type] = {**before, "config": _joined(_switches(CONFIG_MAPPING[model_type], config), before.get("config", {}))}
    _first_built.cache_clear()
    try:
        yield
    finally:
        types[model_type] = before
        _first_built.cache_clear()


def _switches(config_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(config_class)}
    made: dict[str, Any] = {name: value for name, value in config.items() if isinstance(value, bool) and name in known}
    for name, inner in getattr(config_class, "sub_configs", {}).items():
        if isinstance(config.get(name), Mapping) and is_dataclass(inner):
            made[name] = _switches(inner, config[name])
    return made


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the other first; sections are joined name by name."""
    both = {name: _joined(one[name], other[name]) for name in one.keys() & other.keys() if isinstance(other[name], Mapping)}
    return {**one, **other, **both}


def model_classes(model_type: str) -> list[type]:
    """The classes of transformers that a type's checkpoints may be read with: the base model first."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    mappings = sorted(
        (name for name in dir(modeling_auto) if name.endswith("_MAPPING")), key=lambda name: name != "MODEL_MAPPING"
    )
    found = [getattr(modeling_auto, name) for name in mappings]
    entries = [mapping[config_class] for mapping in found if config_class in mapping]
    return list(dict.fromkeys(entry[0] if isinstance(entry, tuple) else entry for entry in entries))


def classes_to_build(model_type: str) -> list[type]:
    """As `model_classes`, the first of which a tiny model can be built before all others.

    Raises
    ------
    HeadgramError
        As `way_of`.
    """
    first, _ = _first_built(model_type)
    return [first, *(one for one in model_classes(model_type) if one is not first)]


def way_of(model_type: str) -> Way:
    """The first way of shrinking in which a type's base model can be built, or else any of its classes.

    Raises
    ------
    HeadgramError
        If there is none: says why the base model cannot be built in the first way.
    """
    return _first_built(model_type)[1]


@cache
def _first_built(model_type: str) -> tuple[type, Way]:
    reasons = []
    for model_class, way in ((one, way) for one in model_classes(model_type) for way in WAYS):
        try:
            for number in range(len(SHAPES)):
                check_size(model_class, tiny_config(model_type, number, way))
        except Exception as error:  # whatever transformers raises
            reasons.append(f"{type(error).__name__}: {error!s:.200}".replace("\n", " "))
            continue
        return model_class, way
    raise HeadgramError(reasons[0])


def tiny_config(model_type: str, number: int, way: Way) -> Any:
    """A tiny configuration of a type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**shrunk(config_class, number, tiny_data()["types"].get(model_type, {}).get("config", {}), way))
    for section in (config, *(getattr(config, name, None) for name in getattr(config_class, "sub_configs", {}))):
        _keep_attention(section)
    config._attn_implementation = config._experts_implementation = "eager"
    return config


def _keep_attention(config: Any) -> None:
    """Give a tiny configuration whose layers all lack softmax attention a last one with it, where the whole model has such."""
    kinds = getattr(config, "layer_types", None)
    if not kinds or any("attention" in kind and "linear" not in kind for kind in kinds):
        return
    whole = getattr(type(config)(), "layer_types", None) or ()
    attention = [kind for kind in whole if "attention" in kind and "linear" not in kind]
    if attention:
        config.layer_types = [*kinds[:-1], attention[0]]


def tiny_model(model_type: str, model_class: Any, number: int) -> nn.Module:
    """A tiny model with random weights and biases.

    Raises
    ------
    HeadgramError
        As `way_of`.
    """
    return random_model(model_class, tiny_config(model_type, number, way_of(model_type)))


def check_size(model_class: Any, config: Any) -> None:
    """Refuse a configuration that makes no tiny model.

    Raises
    ------
    HeadgramError
        Says how large the model would be.
    """
    with torch.device("meta"):
        size = sum(weight.numel() for weight in model_class(config).parameters())
    if size > _LARGEST_MODEL:
        raise HeadgramError(f"the tiny {model_class.__name__} has {size:,} weights: tiny_models.toml leaves a size out")


def random_model(model_class: Any, config: Any) -> nn.Module:
    """A model with random weights and biases."""
    torch.manual_seed(_SEED)
    model: nn.Module = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2)
    return model


def walked_models(model_type: str) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The tiny models of a type whose data the walk has written: the base model in all shapes, then every class once."""
    entry = tiny_data()["types"].get(model_type, {})
    base, *others = classes_to_build(model_type)
    for model_class, number in [*((base, number) for number in range(len(SHAPES))), *((other, 0) for other in others)]:
        try:
            model: Any = tiny_model(model_type, model_class, number)
        except Exception:
            if model_class is base:
                raise
            continue  # some classes need what a tiny configuration does not say
        if model_class is base or model.config.model_type == model_type:  # some classes are saved as one of their towers
            yield model, entry
