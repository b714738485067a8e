"""What a family's data say of all that stands around the projections: norms, rotary encoding, the scale of scores, embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: What can be asked of a layer besides the factors of its heads.
AROUND = ("norm", "source_norm", "query_norm", "key_norm", "output_norm", "query_bias", "key_bias", "rotary", "scale", "cap")
#: What can be asked of a model.
TABLES = ("embedding", "unembedding", "final_norm")


class _Stated(Protocol):
    """A checkpoint's configuration."""

    def get(self, name: str) -> Any:
        """What it states under a name, or None."""


class Rule(BaseModel):
    """A part of a family's data file: what it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


#: The field of a rule that says what a role is, where that has another name.
_FIELDS = {"query_bias": "biases", "key_bias": "biases", "source_norm": "source"}
#: A module's name; nothing in braces but the head.
_Place = Annotated[str, Field(pattern=r"^[^{}]*(\{head\}[^{}]*)?$", max_length=500)]


class NormRule(Rule):
    """One norm: `none` where the block reads the stream as it is, which the norm of the block before may have left.

    A `gain` multiplies each channel and divides by nothing, as layer scale does.
    """

    kind: Literal["rms", "layer", "gain", "none"]
    #: Below `block`, `{head}` for one of each head, a gain's own tensor; None: a norm without weights.
    module: _Place | None = None
    not_first: bool = False  # layer 0 reads the stream as it is
    plus: int = 0  # the gain is `plus` + what is stored, such as 1 + w
    times: str | None = None  # the configuration's name for a factor of the norm's output, if it states one


class RotaryRule(Rule):
    """How positions turn queries and keys: pairs of rows as `halves` or `interleaved`, or `none`.

    Bases, shares and scalings are read as transformers reads them, from `rope_parameters` or from older names.
    """

    kind: Literal["halves", "interleaved", "none"]
    bases: tuple[str, ...] = ("rope_theta", "rotary_emb_base")  # the configuration's names for the base
    local_base: str | None = None  # its name for the base of sliding layers, if they have their own
    width: str | None = None  # its name for the number of rows that turn, if it states no share of them
    sign: Literal[1, -1] = 1  # -1: positions turn backwards
    only: str | None = None  # the one kind of `layer_types` that turns
    unless_null: str | None = None  # all layers turn if the configuration states null under this name
    flags: str | None = None  # its name for a list with a 0 for every layer that does not turn
    every: str | None = None  # its name for the number of layers of which one is full and the others slide
    period: int | None = None  # the value of `every` if the configuration does not state it
    phase: int = -1  # which of so many layers is the full one: the last, or number 0
    when: dict[str, str | bool] = Field(default={})  # what the configuration must state for anything to turn
    by_layer: str | None = None  # its name for a list of bases, one for each layer; layers of base 0 do not turn
    prefix: str | None = None  # its name for the number of first, dense layers, which turn whatever their kind
    share: bool | None = None  # whether it may state that a share of the rows turns; None: only with a scaling
    renamed: dict[str, str] = Field(default={})  # scalings that it calls by another one's name
    factors: bool = False  # `short_mscale` and `long_mscale` scale the rows that turn, where these are scaled at all


class ScaleRule(Rule):
    """What scores are multiplied by: `value * x ** power`, `x` as the configuration states it under a name, or the rank."""

    value: float = 1
    config: str | None = None
    power: float = -0.5
    times: str | None = None  # a further factor that the configuration may state
    by_layer: str | None = None  # a switch: layer `l` divides by `l + 1` too
    mscale: bool = False  # YaRN's own factor, as in DeepSeek
    refused: str | None = None  # what would change the scale in a way that is not known


class AroundRule(Rule):
    """What stands around the projections, for some types, in configurations that state `when` and anything under `given`.

    If several rules apply, a later rule overrides the fields that it names. Without any, nothing is proven. A field that no rule
    names is what most models have: no norms of queries, keys and outputs, biases where the checkpoint holds them, scores over the
    rank's root.
    """

    types: tuple[str, ...] = ()
    when: dict[str, bool | int | str] = Field(default={})
    given: tuple[str, ...] = ()  # names under which null, false and 0 are nothing
    norm: NormRule | None = None
    source: NormRule | None = None  # of another stream, which keys and values read: its module is below the prefix
    query_norm: NormRule | None = None
    key_norm: NormRule | None = None
    output_norm: NormRule | None = None  # of what all heads write together, before it is added to the stream
    biases: bool | None = None  # True: those that the checkpoint holds beside the weights, if it does
    rotary: RotaryRule | None = None
    scale: ScaleRule | None = None
    cap: str | None = None  # what the configuration calls the bound of scores, `c tanh(s / c)`; empty: there is none
    unproven: dict[str, str] = Field(default={})  # role -> why it is left out
    scores: tuple[str, ...] = ()  # what else stands between a form and the model's scores, one clause each
    writes: tuple[str, ...] = ()  # likewise of what heads write

    @model_validator(mode="after")
    def _known(self) -> Self:
        if unknown := set(self.unproven) - set(AROUND):
            raise ValueError(f"unknown role {sorted(unknown)[0]!r}")
        return self

    def said(self, role: str) -> Any:
        """What the rule says of a role, or None. Without a `source`, keys and values read the same normed stream as queries."""
        if role == "source_norm" and role not in self.unproven:
            return self.source or self.norm
        return getattr(self, _FIELDS.get(role, role))


_USUAL: dict[str, Any] = {
    "query_norm": NormRule(kind="none"),
    "key_norm": NormRule(kind="none"),
    "output_norm": NormRule(kind="none"),
    "biases": True,
    "scale": ScaleRule(),
    "cap": "",
}


#: What rules say one after another.
_GATHERED = ("unproven", "scores", "writes")


def unproven_rule(why: str) -> AroundRule:
    """A rule that knows nothing, for one reason."""
    return AroundRule(unproven=dict.fromkeys(AROUND, why))


def rule_of(rules: Iterable[AroundRule], architecture: str, config: _Stated) -> AroundRule:
    """What the rules that are about a type and a configuration say together."""
    said: dict[str, Any] = {}
    for rule in rules:
        if (rule.types and architecture not in rule.types) or any(config.get(key) != value for key, value in rule.when.items()):
            continue
        if not all(map(config.get, rule.given)):
            continue
        named = {name: getattr(rule, name) for name in rule.model_fields_set - {"types", "when", "given", *_GATHERED}}
        said = {**_USUAL, **said, **named, "unproven": {**said.get("unproven", {}), **rule.unproven}}
        said |= {name: said.get(name, ()) + getattr(rule, name) for name in ("scores", "writes")}
    unproven_rule = {_FIELDS.get(role, role): None for role in said.get("unproven", {})}
    return AroundRule(**{**said, **unproven_rule})
