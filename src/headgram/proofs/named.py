"""Under which name a configuration states a count of a stack: its heads, its width, its layers."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

#: Names that are taken before others.
PREFERRED = {
    "heads": (
        "num_attention_heads",
        "n_head",
        "num_heads",
        "n_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "attention_heads",
    ),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "rank": ("head_dim", "attention_head_dim", "d_kv"),
    "hidden": ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "width"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "depth"),
    "value_rank": ("v_head_dim",),
    "output_width": ("hidden_size", "d_model"),
}
#: What a name of a count holds, as a regular expression.
_WORDS = {
    "heads": "head",
    "kv_heads": "key_value|kv|group",
    "rank": "head_dim|d_kv|dim_head|head_size|channels",
    "hidden": "hid|dim|d_|emb|width|size",
    "layers": "layer|depth|block",
    "value_rank": "v_head|value",
    "output_width": "hidden|d_model|width",
}
#: Of `t2u_encoder_layers`, the tower `t2u`. A model with several encoders begins the names of each one's counts with its tower.
_TOWER = re.compile("(?!num_|n_)([a-z0-9]+)_(?:en|de)coder_")


def name_of_count(
    what: str, values: Sequence[int], sections: Sequence[Mapping[str, Any]], path: str, declared: Container[str]
) -> str | None:
    """The name under which the configurations of several models state these numbers; rather one that its class has `declared`."""
    names = [
        name
        for name in sections[0]
        if all(type(section.get(name)) is int and section[name] == value for section, value in zip(sections, values, strict=True))
        and re.search(_WORDS[what], name)
    ]
    if what == "heads":
        names = [name for name in names if not re.search("key_value|kv|head_dim|linear", name)]
    if what == "rank":
        names = [name for name in names if not re.search("qk_|v_head|rope|index|linear|global", name)]
    sides = [side for side in ("decoder", "encoder") if side in path]

    def order(name: str) -> tuple[Any, ...]:
        preferred = PREFERRED[what]
        if what in ("hidden", "output_width") and name in preferred:
            return (preferred.index(name) - len(preferred),)
        other = [side for side in ("decoder", "encoder") if side in name]
        place = name.rpartition(".")[2]
        tower = _TOWER.match(name)
        return (
            place.isdigit() and f".{place}." not in path,
            bool(other) and other[0] not in sides[:1],
            1 if tower is None else 0 if tower[1] in path else 2,
            name.partition(".")[0] not in declared,
            not (sides and other == sides[:1]),
            preferred.index(name) if name in preferred else len(preferred),
        )

    return min(names, key=order, default=None)


def at_layer(section: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """A section as it is for one layer."""
    changes = {int(number): change for number, change in (section.get("per_layer_config") or {}).items()}
    return {**section, **changes.get(layer, {})}


def stated(section: Mapping[str, Any]) -> dict[str, Any]:
    """What a section states, entries of lists under their number, and of inner sections under both names."""
    inner: dict[str, Mapping[Any, Any]] = {
        name: dict(enumerate(value)) for name, value in section.items() if isinstance(value, list | tuple)
    }
    inner |= {name: value for name, value in section.items() if isinstance(value, Mapping)}
    return {**section, **{f"{name}.{place}": one for name, value in inner.items() for place, one in value.items()}}
