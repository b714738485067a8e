"""Names of modules that only wrap others, which training code leaves in a checkpoint."""

from __future__ import annotations

from headgram.checkpoints.stores import TensorStore
from headgram.checkpoints.views import Renamed
from headgram.errors import HeadgramError


def without_wrappers(store: TensorStore) -> TensorStore:
    """The store, with names as they are without modules that only wrap another.

    Wrappers keep what they wrap as a private attribute (`_orig_mod` of `torch.compile`, `_fsdp_wrapped_module` and
    `_checkpoint_wrapped_module` of sharded training), or as `module` (data parallelism).

    Raises
    ------
    HeadgramError
        If two tensors have one name then.
    """
    stored: dict[str, str] = {}
    for name in store.names():
        plain = plain_name(name)
        if plain in stored:
            raise HeadgramError(
                f"the tensors {stored[plain]!r:.200} and {name!r:.200} differ in wrapping modules only, and nothing says "
                "which is meant: save one without the other"
            )
        stored[plain] = name
    return store if all(plain == name for plain, name in stored.items()) else Renamed(store, stored)


def plain_name(name: str) -> str:
    """A name without its wrapping modules."""
    *modules, last = name.split(".")
    return ".".join([part for part in modules if part != "module" and (not part.startswith("_") or part == "_")] + [last])
