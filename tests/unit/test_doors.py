"""What a caller may hand to the public functions: numbers of every kind are taken, all else is refused in one sentence."""

import inspect
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import headgram
from tiny import write_llama

_RANDOM = np.random.default_rng(0)
QUERY, KEY = _RANDOM.standard_normal((4, 8, 32)), _RANDOM.standard_normal((2, 8, 32))

TAKEN = {
    "float64": QUERY,
    "float32": QUERY.astype(np.float32),
    "float16": QUERY.astype(np.float16),
    "other byte order": QUERY.astype(">f4"),
    "a view": QUERY[:, ::-1, :],
    "read-only": np.broadcast_to(np.float32(0.5), QUERY.shape),
    "bfloat16": torch.from_numpy(QUERY).bfloat16(),
    "with a gradient": torch.from_numpy(QUERY).requires_grad_(),
}
REFUSED = {
    "None": (None, "not NoneType"),
    "text": ("weights", "not str"),
    "lists": (QUERY.tolist(), "not list"),
    "a truth value": (True, "not bool"),
    "whole numbers": (QUERY.astype(int), "int64, not floating"),
    "torch's whole numbers": (torch.ones(4, 8, 32, dtype=torch.int8), "int8, not floating"),
    "complex": (QUERY + 0j, "complex128, not floating"),
    "objects": (np.array([None]), "object, not floating"),
    "wider than 64 bits": (QUERY.astype(np.longdouble), "not floating point of 16, 32 or 64 bits"),
    "NaN": (np.full_like(QUERY, np.nan), "query weights hold a NaN"),
    "infinity": (torch.full((4, 8, 32), -torch.inf), "query weights hold a NaN or an infinity"),
    "one head": (QUERY[0], r"\(8, 32\)"),
    "no head": (QUERY[:0], r"\(0, 8, 32\)"),
    "no width": (QUERY[:, :, :0], r"\(4, 8, 0\)"),
    "another rank": (QUERY[:, :7], r"\(4, 7, 32\)"),
    "another width": (QUERY[:, :, :31], r"\(4, 8, 31\)"),
    "sparse": (torch.from_numpy(QUERY).to_sparse(), "sparse"),
    "nothing": (torch.empty(4, 8, 32, device="meta"), "meta device"),
}


@pytest.mark.parametrize("weights", TAKEN.values(), ids=TAKEN)
def test_arrays_and_tensors_give_the_same(weights):
    judge = torch.from_numpy(weights.astype(np.float64)) if isinstance(weights, np.ndarray) else weights.detach().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = headgram.spectrum(weights, KEY)
        product = headgram.gram(weights[None], KEY[None], weights[None], KEY[None], precision="float64")
    forms = torch.einsum("hrk,hrq->hkq", torch.from_numpy(KEY).repeat_interleave(2, 0), judge)
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(forms)[:, :8])
    torch.testing.assert_close(product[0, 0], forms.square().sum((1, 2)))


@pytest.mark.parametrize(("weights", "sentence"), REFUSED.values(), ids=REFUSED)
def test_other_weights_are_refused(weights, sentence):
    with pytest.raises(headgram.HeadgramError, match=sentence):
        headgram.spectrum(weights, KEY)
    many = weights[None] if isinstance(weights, np.ndarray | torch.Tensor) else weights
    with pytest.raises(headgram.HeadgramError):
        headgram.gram(many, KEY[None], QUERY[None], KEY[None])


@pytest.mark.parametrize("topk", [None, "8", 2.5, True, 0, -1])
def test_other_counts_of_directions_are_refused(topk):
    with pytest.raises(headgram.HeadgramError, match="topk"):
        headgram.spectrum(QUERY, KEY, topk=topk)


@pytest.mark.parametrize("precision", [None, "float32", 64])
def test_other_precisions_are_refused(precision):
    with pytest.raises(headgram.HeadgramError, match="auto, float64"):
        headgram.gram(QUERY[None], KEY[None], QUERY[None], KEY[None], precision=precision)


def test_tables_are_read_in_the_one_way_that_does_not_abort():
    """`pq.read_table` of an open file ends some processes under load; `make stress` tries all doors (tests/stress.py)."""
    for path in Path(headgram.__file__).parent.rglob("*.py"):
        assert not re.search(r"\bpq\.read_table|read_parquet\(", path.read_text()), path


NO_PATHS = [None, 3, b"bytes", [], {}, "", "\0", "not there", "n" * 5000, Path("not there")]


@pytest.mark.parametrize("path", NO_PATHS, ids=repr)
def test_no_path_opens_nothing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for door in (headgram.open_checkpoint, headgram.open_atlas):
        with pytest.raises(headgram.HeadgramError) as refused:
            door(path)
        assert "\n" not in str(refused.value)


def test_other_arguments_of_a_checkpoint_are_refused(tmp_path):
    source = write_llama(tmp_path / "llama", layers=1)
    for arguments in ({"revision": 3}, {"overrides": "heads"}, {"overrides": {"heads": "4"}}, {"overrides": {None: 1}}):
        with pytest.raises(headgram.HeadgramError):
            headgram.open_checkpoint(source, **arguments)
    with headgram.open_checkpoint(source) as checkpoint:
        assert checkpoint.qk("self", np.int64(0))[0].shape == (4, 8, 32)
        for stack, layer in (("none", 0), (None, 0), (["self"], 0), *(("self", no) for no in (1, None, "0", 0.0, True))):
            with pytest.raises(headgram.HeadgramError):
                checkpoint.qk(stack, layer)
        for roles in (3, [3], ["gate"]):
            with pytest.raises(headgram.HeadgramError, match="role"):
                checkpoint.factors("self", 0, roles)


def test_other_arguments_of_an_atlas_are_refused(tmp_path):
    for wrong in (None, 3, ["a"]):
        with pytest.raises(headgram.HeadgramError, match="`a` is a text"):
            headgram.compare(wrong, "b", tmp_path)
        with pytest.raises(headgram.HeadgramError, match="`b` is a text"):
            headgram.compare("a", wrong, tmp_path)
    with pytest.raises(headgram.HeadgramError, match="has no table"):
        headgram.Atlas(tmp_path).table("none")


#: Of no door's type.
NOTHINGS = [3.5, True, [], ["x"], {}, (1,), {1}, b"x", object(), np.array([1, 2]), torch.zeros(2), str, len]


def test_models_without_a_lineage_are_none(tmp_path, monkeypatch):
    table = pd.DataFrame({"model": ["a", "b"], "lineage": ["", "l"], "step": [0.0, 1.0], "layers": [2, 3]})
    monkeypatch.setattr(headgram.Atlas, "summary", lambda self: table)
    atlas = headgram.Atlas(tmp_path)
    assert atlas.lineage("l") == {"b": 1.0}
    with pytest.raises(headgram.HeadgramError, match="no lineage ''; there are: l"):
        atlas.lineage("")
    for wrong in (10**30, "none", [1, "x"]):
        with pytest.raises(headgram.HeadgramError, match="holds no model with layers = "):
            atlas.where(layers=wrong)
    for wrong in (None, [None], object(), pd.DataFrame(), True, b"x"):
        with pytest.raises(headgram.HeadgramError, match="`layers` is compared with texts and numbers, not "):
            atlas.where(layers=wrong)


def _arguments():
    """Every argument of every method of an atlas, and of every chart, that is a text or a whole number."""
    methods = inspect.getmembers(headgram.Atlas, inspect.isfunction)
    charts = inspect.getmembers(headgram.plot, lambda each: getattr(each, "__module__", "") == "headgram.plot" and callable(each))
    for name, function in [*methods, *charts]:
        if not name.startswith("_"):
            for argument, each in list(inspect.signature(function).parameters.items())[1:]:
                if each.kind is each.POSITIONAL_OR_KEYWORD and argument not in ("models", "signed"):
                    yield pytest.param(function, argument, id=f"{name}-{argument}")


@pytest.mark.parametrize(("function", "argument"), list(_arguments()))
def test_every_argument_of_another_type_is_refused_by_its_name(function, argument, tmp_path):
    parameters = inspect.signature(function).parameters
    wanted = [each for each in list(parameters.values())[1:] if each.default is each.empty or each.name == argument]
    good = {each.name: 0 if str(each.annotation).startswith("int") else "a" for each in wanted}
    for wrong in NOTHINGS:
        with pytest.raises(headgram.HeadgramError, match=rf"^`{argument}` is a (text|whole number), not "):
            function(headgram.Atlas(tmp_path), **good | {argument: wrong})
