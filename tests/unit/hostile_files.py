"""Files of checkpoints that somebody made to do harm, and how they are refused."""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from headgram.checkpoints.known import open_checkpoint
from headgram.errors import HeadgramError

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


QUERY = "model.layers.0.self_attn.q_proj.weight"


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def read_all(source: Path, overrides: dict | None = None) -> None:
    with open_checkpoint(source, overrides=overrides) as checkpoint:
        for stack in checkpoint.stacks:
            for layer in stack.layers:
                checkpoint.qk(stack.name, layer)
                checkpoint.digest(stack.name, layer)


def assert_refused(source: Path, sentence: str = ".", overrides: dict | None = None) -> None:
    with pytest.raises(HeadgramError, match=sentence) as caught:
        read_all(source, overrides)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def pickled(value: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def archive(pickle_bytes: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Torch's zip format around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickle_bytes)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
        for name, content in (storages or {}).items():
            file.writestr(f"archive/data/{name}", content)
    return buffer.getvalue()


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...], numel: int = 4, offset: int = 0) -> bytes:
    """A pickled `{QUERY: tensor}` over storage `0`, with any size and stride."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({QUERY: Tensor()})
    return buffer.getvalue()


def assert_read_or_refused(path: Path) -> None:
    try:
        read_all(path)
    except HeadgramError:
        return
