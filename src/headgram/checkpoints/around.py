"""What stands around the projections of one layer: norms, biases, rotary encoding, the scale and the bound of its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from headgram.checkpoints.dimensions import Section
from headgram.checkpoints.rotary import Planes, mscale, planes_of, positive
from headgram.checkpoints.stores import TensorStore
from headgram.errors import HeadgramError
from headgram.families.around import AROUND, AroundRule, NormRule, ScaleRule
from headgram.families.layouts import LAYOUTS, Dimensions, Part, undo_gguf_permutation

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from headgram.forms.reading import Norm, Rotary

_UNSAID = "the family's data do not say what it is, for it is not proven"


@dataclass(frozen=True)
class Surroundings:
    """What is known of a stack besides its factors.

    The names of a layer's modules begin with `place`; those of modules that all layers share, with `prefix`.
    """

    rule: AroundRule
    section: Section
    prefix: str
    place: str
    modules: Mapping[str, str]
    layout: str
    dims: Dimensions
    permuted: bool = False

    @property
    def missing(self) -> dict[str, str]:
        """The roles that cannot be read, each with a sentence that says why."""
        reasons = dict(self.rule.unproven)
        if self.rule.source is None and "norm" in reasons:
            reasons.setdefault("source_norm", reasons["norm"])
        return {role: reasons.get(role, _UNSAID) for role in AROUND if self.rule.said(role) is None}


@dataclass(frozen=True)
class Around:
    """What stands around the projections of one layer, read when it is asked for; from `Checkpoint.around`.

    Every attribute raises a `HeadgramError` if it is not proven for the family, or if the checkpoint or its configuration lacks
    what it follows from.
    """

    stack: str
    layer: int
    _known: Surroundings = field(repr=False)
    _store: TensorStore = field(repr=False)

    @property
    def norm(self) -> Norm | None:
        """What the block's norm does to the stream that queries read; None if they read the stream as it is."""
        return self._norm("norm", [(self._known.dims.hidden,)])

    @property
    def source_norm(self) -> Norm | None:
        """Likewise of keys and values: the same, but in cross-attention, where it is the output norm of the stack they read."""
        return self._norm("source_norm", [(self._known.dims.hidden,)])

    @property
    def query_norm(self) -> Norm | None:
        """The norm of queries, with a row of gains for each of `H` heads; None if there is none."""
        return self._head_norm("query_norm")

    @property
    def key_norm(self) -> Norm | None:
        """The norm of keys, with a row of gains for each of `K` heads; None if there is none."""
        return self._head_norm("key_norm")

    @property
    def output_norm(self) -> Norm | None:
        """What a norm, or a gain alone, does to all that heads write together, before it joins the stream; None if neither."""
        return self._norm("output_norm", [(self._known.dims.output_width,)])

    @property
    def query_bias(self) -> Float[Tensor, "heads rank"] | None:
        """What is added to `W_Q x`; None if nothing is."""
        return self._bias("query_bias")

    @property
    def key_bias(self) -> Float[Tensor, "kv_heads rank"] | None:
        """What is added to `W_K x`; None if nothing is."""
        return self._bias("key_bias")

    @property
    def scale(self) -> float:
        """What `x_k^T g x_q` is multiplied by before the softmax."""
        rule: ScaleRule = self._said("scale")
        section = self._known.section
        if rule.refused is not None and section.get(rule.refused) is not None:
            self._lacks("scale", f"{section.whose} states {rule.refused}, which changes it in a way that is not known")
        try:
            scale = self._scale(rule)
        except ArithmeticError:
            scale = math.inf
        if not 0 < scale < math.inf:
            self._lacks("scale", f"{section.whose} states numbers that give no scale")
        return scale

    @property
    def cap(self) -> float | None:
        """The bound `c` of scores that become `c tanh(s / c)`; None if they have none."""
        name = self._said("cap")
        return None if not name or self._known.section.get(name) is None else self._number(name)

    def rotary(self, length: int | None = None) -> Rotary | None:
        """How positions turn queries and keys; None if they do not.

        Parameters
        ----------
        length
            Of the context in tokens: a few models turn otherwise in contexts that are longer than those of their training. No
            longer than those, if not given.
        """
        planes = self._planes(length)
        return planes.rotary() if planes else None

    @property
    def turns(self) -> bool:
        """Whether positions turn queries and keys."""
        return self._planes() is not None

    def read(self, role: str) -> Any:
        """What one of the roles is; of `rotary`, in contexts that are no longer than those of the training."""
        return self.rotary() if role == "rotary" else getattr(self, role)

    def check(self, role: str) -> None:
        """Raise what reading a role would raise, without reading a tensor: damage to their values is not found."""
        for name in (names := self.names(role)):
            if name not in self._store:
                raise HeadgramError(f"layer {self.layer}: the checkpoint lacks tensor {name}")
        if not names:
            getattr(self, "turns" if role == "rotary" else role)

    def names(self, role: str) -> list[str]:
        """The tensors of this layer that hold a norm or a bias; none for other roles."""
        if role in ("query_bias", "key_bias"):
            return list(self._bias_names(role)[1].values())
        if role not in ("norm", "source_norm", "query_norm", "key_norm", "output_norm"):
            return []
        return [name for names in self._norm_names(role).values() for name in names]

    def _planes(self, length: int | None = None) -> Planes | None:
        rule, dims = self._said("rotary"), self._known.dims
        return planes_of(rule, self._known.section, self.layer, dims.rank, dims.sizes.get("nope", 0), length)

    def _scale(self, rule: ScaleRule) -> float:
        section = self._known.section
        base = self._known.dims.rank if rule.config is None else self._number(rule.config)
        scale: float = rule.value * base**rule.power * self._factor(rule.times)
        if rule.by_layer is not None and section.get(rule.by_layer):
            scale /= self.layer + 1
        stated = section.get("rope_parameters") or section.get("rope_scaling")
        scaled = isinstance(stated, Mapping) and (stated.get("rope_type") or stated.get("type") or "default") != "default"
        if rule.mscale and scaled and stated.get("mscale_all_dim"):
            factor, share = (positive(section, name, stated.get(name)) for name in ("factor", "mscale_all_dim"))
            scale *= mscale(factor, share) ** 2
        return scale

    def _heads(self, role: str) -> int:
        return self._known.dims.heads if role.startswith("query") else self._known.dims.kv_heads

    def _head_norm(self, role: str) -> Norm | None:
        heads, rank = self._heads(role), self._known.dims.rank
        norm = self._norm(role, [(rank,), (heads * rank,), (heads, rank)])
        if norm is None:
            return None
        gain, bias = (None if part is None else part.view(-1, rank).expand(heads, rank) for part in (norm.gain, norm.bias))
        return replace(norm, gain=gain, bias=bias)

    def _norm(self, role: str, shapes: list[tuple[int, ...]]) -> Norm | None:
        rule: NormRule = self._said(role)
        if rule.kind == "none" or (self.layer == 0 and rule.not_first):
            return None
        import torch

        from headgram.forms.reading import Norm

        names = self._norm_names(role)
        found = {kind: torch.cat([self._read(name, shapes) for name in some]) for kind, some in names.items()}
        gain = (found["weight"] + rule.plus) * self._factor(rule.times) if found else None
        return Norm(rule.kind == "layer", gain, found.get("bias"), divides=rule.kind != "gain")

    def _norm_names(self, role: str) -> dict[str, list[str]]:
        """`weight`, and `bias` if the checkpoint holds it -> one tensor, or one for each head."""
        rule: NormRule = self._said(role)
        place = self._source_place if role == "source_norm" else self._place
        if rule.module is None or (self.layer == 0 and rule.not_first):
            return {}
        modules = dict.fromkeys(rule.module.format(head=head) for head in range(self._heads(role)))
        if rule.kind == "gain":
            return {"weight": [place + module for module in modules]}
        names = {kind: [f"{place}{module}.{kind}" for module in modules] for kind in ("weight", "gamma", "bias", "beta")}
        held = {kind: found for kind, found in names.items() if found[0] in self._store}
        weight, bias = held.get("gamma", names["weight"]), held.get("bias") or held.get("beta")
        bias = bias if rule.kind == "layer" else None  # models have none beside a gain for the rms, and do not read it
        return {"weight": weight} | ({} if bias is None else {"bias": bias})

    def _bias(self, role: str) -> Tensor | None:
        """A bias is a weight that reads one channel, which is always 1."""
        part, names = self._bias_names(role)
        if not names:
            return None
        if len(part.reads) > 1:
            self._lacks(role, f"layer {self.layer}: {next(iter(names.values()))} passes through a norm, and adds no fixed vector")
        dims = replace(self._known.dims, hidden=1)
        ((tensor, shape),) = part.shapes(dims).items()
        weight = self._read(names[tensor], [(math.prod(shape),)]).view(shape)
        side = role.removesuffix("_bias")
        if self._known.permuted:
            weight = undo_gguf_permutation(weight, self._heads(role))
        bias = part.split(dims, **{tensor: weight})[side][..., 0]
        if bias.any() and self._known.section.get("attention_bias") is False:
            held = f"the checkpoint holds {names[tensor]}, which is not zero: correct one of them"
            self._lacks(role, f"{self._known.section.whose} has attention_bias = false, but {held}")
        return bias if bias.any() else None

    def _bias_names(self, role: str) -> tuple[Part, dict[str, str]]:
        """The part of the layout that gives a side, and the biases beside its weights that the checkpoint holds."""
        self._said(role)
        part = next(part for part in LAYOUTS[self._known.layout] if role.removesuffix("_bias") in part.gives)
        names = {tensor: f"{self._place}{self._known.modules[tensor]}.bias" for tensor in part.reads}
        return part, {tensor: name for tensor, name in names.items() if name in self._store}

    @property
    def _place(self) -> str:
        return self._known.place.format(layer=self.layer)

    @property
    def _source_place(self) -> str:
        return self._place if self._known.rule.source is None else self._known.prefix.format(layer=self.layer)

    def _said(self, role: str) -> Any:
        value = self._known.rule.said(role)
        if value is None:
            self._lacks(role, self._known.missing[role])
        return value

    def _lacks(self, role: str, why: str) -> NoReturn:
        raise HeadgramError(f"the stack '{self.stack}' has no role '{role}' to read: {why}")

    def _factor(self, name: str | None) -> float:
        return 1.0 if name is None or self._known.section.get(name) is None else self._number(name)

    def _number(self, name: str) -> float:
        return positive(self._known.section, name, self._known.section.get(name))

    def _read(self, name: str, shapes: list[tuple[int, ...]]) -> Tensor:
        if name not in self._store:
            raise HeadgramError(f"layer {self.layer}: the checkpoint lacks tensor {name}")
        if self._store.shape(name) not in shapes:
            wanted = " or ".join(map(str, dict.fromkeys(shapes)))
            raise HeadgramError(
                f"layer {self.layer}: tensor {name} has shape {self._store.shape(name)}, which should be {wanted}"
            )
        from headgram.geometry.checks import is_finite

        tensor = self._store.read(name)
        if not is_finite(tensor):
            raise HeadgramError(f"layer {self.layer}: tensor {name} holds a NaN or an infinity: the checkpoint is damaged")
        return tensor.double()


def check_biases(role: str, layers: Sequence[Around]) -> None:
    """Refuse a bias that some layers of a stack have and others lack: no model is like that, so tensors are missing.

    Of queries and keys, biases that are zero count as none.

    Raises
    ------
    HeadgramError
        If a layer lacks one.
    """
    names = {layer.layer: layer.names(role) for layer in layers}
    if role in ("query_bias", "key_bias"):
        held = {number: bool(some) for number, some in names.items()}
    else:
        held = {number: any(name.endswith((".bias", ".beta")) for name in some) for number, some in names.items() if some}
    lacking = [number for number, has in held.items() if not has]
    if not lacking or not any(held.values()):
        return
    if role in ("query_bias", "key_bias") and all(layer.read(role) is None for layer in layers):
        return
    raise HeadgramError(f"layer {lacking[0]}: the checkpoint lacks the bias of '{role}' that other layers have: fetch it again")
