"""Every registered model type, against the scores that the models themselves compute."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headgram.checkpoints.checkpoint import open_checkpoint
from headgram.checkpoints.dimensions import find_rules
from headgram.errors import HeadgramError
from headgram.families import layouts
from headgram.families.registry import Family, StackRule, families, family_of, others
from headgram.proofs.calls import Call
from headgram.proofs.listed import listed_models
from headgram.proofs.prove import TOLERANCE, Proof, known_types, prove
from headgram.proofs.shrink import model_classes, quiet, tiny_config, way_of

#: Prefixes of published checkpoints that transformers reads, but no longer writes: type, what it writes, what it reads.
OLD_PREFIXES = [
    ("clip_text_model", "", "text_model."),
    ("clip_vision_model", "", "vision_model."),
    ("llava", "language_model.model.", "model.language_model."),
]
#: Types that the walk has found, one of each kind: `make walk` proves all.
WALKED = [
    *("apertus", "axk1", "blip", "cohere_asr", "dbrx", "deformable_detr", "detr", "donut-swin", "embedding_gemma2_text"),
    *("esmc", "funnel", "kimi_linear", "lilt", "mimi", "musicgen", "nemotron_asr_streaming_encoder", "sam", "siglip2", "xglm"),
]


def saved(model_type: str, folder: Path, number: int = 0) -> Path:
    """The type's tiny model of this number, on disk."""
    model = [model for model, _ in listed_models(model_type)][number]
    model.save_pretrained(folder)
    return folder


def reconfigured(folder: Path, **changes: object) -> Path:
    """The same checkpoint with changes to its config.json; None takes an entry away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def renamed(folder: Path, old: str, new: str) -> Path:
    """The same checkpoint with another prefix before its tensors' names."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = {name: new + name.removeprefix(old) if name.startswith(old) else name for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    return folder


#: What configurations call the parameters of rotary encoding, which transformers gathers under one name.
ROTARY = ("rope_theta", "rope_parameters", "partial_rotary_factor", "rotary_pct", "global_rope_theta")


@pytest.fixture(scope="module")
def followed() -> Iterator[set[tuple[str, int, str]]]:
    """Every rule that a checkpoint of this module's tests follows: its family, its number, and the prefix."""
    seen = set()

    def recording(store: Any, family: Family, *rest: Any) -> list[tuple[StackRule, str]]:
        found = find_rules(store, family, *rest)
        seen.update((family.name, family.stacks.index(rule), prefix) for rule, prefix in found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headgram.checkpoints.checkpoint.find_rules", recording)
        yield seen


@cache
def proof_of(model_type: str) -> Proof:
    return prove(model_type)


@pytest.mark.parametrize("model_type", [*known_types(walked=False), *WALKED])
def test_weights_give_the_models_own_scores_and_writes(model_type: str, followed: set[tuple[str, int, str]]) -> None:
    proof = proof_of(model_type)
    assert proof.problem is None
    assert proof.residual <= TOLERANCE
    assert len(proof.shapes) >= 2
    assert {"query", "key"} <= set(proof.roles)
    assert set(layouts.ROLES) - set(proof.roles) <= {reason.split()[0] for reason in proof.missing}


def test_the_page_of_families_is_about_the_registry() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    proofs, paper = (page.split(f"<!-- {name}: ")[1].split(f"<!-- end of {name} -->")[0] for name in ("proofs", "paper"))
    rows = [line.strip("| ").split(" | ") for line in proofs.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == known_types(walked=False), "run `make families`"
    walk = page.split("<!-- walk: ")[1].split("\nNot softmax")[0]
    walked = set(known_types()) - set(known_types(walked=False))
    assert set(re.findall(r"^\| `([\w.-]+)` \|", walk, re.MULTILINE)) == walked, "run `make walk`"
    marks = re.findall(r"`([\w-]+)` \| (yes|no) \|", paper)
    assert marks
    known = {*known_types(), *(name for family in others() for name in family.model_types)}
    assert all((mark == "yes") == (name in known) for name, mark in marks), "run `make families`"


def test_remarks_are_about_types_of_their_family() -> None:
    for family in families():
        known = {*family.model_types, *(family.gguf.architectures if family.gguf else ())}
        assert {name for rule in family.stacks for remark in rule.remarks for name in remark.types} <= known


def test_names_of_stacks_can_be_locked() -> None:
    names = {rule.name for family in families() for rule in family.stacks}
    assert [name for name in names if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name)] == []


def test_an_encoder_and_a_decoder_of_other_types_are_read_as_far_as_these_are_known(tmp_path: Path) -> None:
    """As TrOCR and Donut are published."""
    folder = saved("vision-encoder-decoder", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    with open_checkpoint(folder) as checkpoint:
        assert [stack.name for stack in checkpoint.stacks] == ["encoder", "decoder", "decoder_cross"]
        whole = checkpoint.qk("encoder", 1)
    reconfigured(folder, decoder={**config["decoder"], "model_type": "unheard-of"})
    with open_checkpoint(folder) as checkpoint:
        assert [stack.name for stack in checkpoint.stacks] == ["encoder"]
        assert all(mine.equal(other) for mine, other in zip(checkpoint.qk("encoder", 1), whole, strict=True))
    reconfigured(folder, encoder=None)
    with pytest.raises(HeadgramError, match="no part of this 'vision-encoder-decoder' checkpoint is of a known type.*unheard-of"):
        open_checkpoint(folder)


def test_every_rule_and_every_prefix_is_proven(followed: set[tuple[str, int, str]]) -> None:
    """Nothing is in the data that no checkpoint saved by transformers exercises."""
    for model_type in known_types(walked=False):
        proof_of(model_type)
    rules = {(family, number) for family, number, _ in followed}
    prefixes = {(family, prefix) for family, _, prefix in followed} | {
        (family_of(name).name, new) for name, _, new in OLD_PREFIXES
    }
    prefixes.add(("llama", "model.language_model."))  # LLaVA's text tower, among OLD_PREFIXES
    rules.add(("mpt", 0))  # one key head, which only published code builds: test_published_code.py
    for family in (family for family in families() if family.alone and not family.walked):
        assert {(family.name, number) for number in range(len(family.stacks))} <= rules
        assert {(family.name, prefix) for prefix in family.prefixes} <= prefixes


def _changed(layout: str, change: Callable[[layouts.Dimensions, layouts.Factors], layouts.Factors]) -> tuple[layouts.Part, ...]:
    """A layout that gives something else."""

    def wrapped(part: layouts.Part) -> layouts.Part:
        return dataclasses.replace(part, split=lambda dims, **tensors: change(dims, part.split(dims, **tensors)), rows=None)

    return tuple(wrapped(part) for part in layouts.LAYOUTS[layout])


def _exchanged(one: str, other: str) -> Callable[[layouts.Dimensions, layouts.Factors], layouts.Factors]:
    """One weight for another of the same tensor: keys for queries is invisible to `x_t^T g x_t`."""
    names = {one: other, other: one}
    return lambda _, factors: {role: factors[names.get(role, role)] for role in factors}


def _reordered(role: str) -> Callable[[layouts.Dimensions, layouts.Factors], layouts.Factors]:
    """Head `h` for head `h + 1`."""
    return lambda _, factors: {name: factor.roll(1, 0) if name == role else factor for name, factor in factors.items()}


def _other_pairing(dims: layouts.Dimensions, factors: layouts.Factors) -> layouts.Factors:
    """Query head `h` with key head `h mod K` instead of `h // (H / K)`."""
    if "query" not in factors:
        return factors
    q = factors["query"]
    return {**factors, "query": q.view(-1, dims.kv_heads, dims.rank, dims.hidden).transpose(0, 1).reshape(q.shape)}


def _channel_by_channel(dims: layouts.Dimensions, factors: layouts.Factors) -> layouts.Factors:
    """Columns of `W_O` as if the channels came first and the heads second."""
    if "output" not in factors:
        return factors
    rows = factors["output"].reshape(dims.value_rank, dims.heads, dims.output_width)
    return {**factors, "output": rows.transpose(0, 1).contiguous()}


@pytest.mark.parametrize(
    ("model_type", "layout", "wrong"),
    [
        ("gpt_neox", "interleaved", layouts.LAYOUTS["blocks"]),
        ("gpt_neox", "interleaved", _changed("interleaved", _exchanged("query", "key"))),
        ("gpt_neox", "interleaved", _changed("interleaved", _exchanged("key", "value"))),
        ("codegen", "quarters", layouts.LAYOUTS["blocks"]),
        ("codegen", "quarters", _changed("quarters", _reordered("value"))),
        ("phi3", "blocks", layouts.LAYOUTS["interleaved"]),
        ("llama", "separate", _changed("separate", _other_pairing)),
        ("llama", "separate", _changed("separate", _reordered("value"))),
        ("llama", "separate", _changed("separate", _reordered("output"))),
        ("llama", "separate", _changed("separate", _channel_by_channel)),
        ("gpt2", "column_blocks", _changed("column_blocks", _reordered("output"))),
        ("deepseek_v3", "latent", _changed("latent", _reordered("value"))),
        ("qwen3_next", "gated", _changed("gated", _reordered("output"))),
        ("convbert", "beside", _changed("beside", _reordered("output"))),
        ("longt5", "separate", _changed("separate", _reordered("value"))),
        ("granite_speech", "key_value_blocks", _changed("key_value_blocks", _exchanged("key", "value"))),
    ],
)
def test_a_wrong_layout_is_off_by_order_one(
    monkeypatch: pytest.MonkeyPatch, model_type: str, layout: str, wrong: tuple[layouts.Part, ...]
) -> None:
    monkeypatch.setitem(layouts.LAYOUTS, layout, wrong)
    proof = prove(model_type)
    assert not proof.ok
    assert proof.residual > 0.1


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_next", "bitnet", "laguna", "granite_swa", "gemma4_text"])
def test_what_lies_between_values_and_outputs_must_be_remarked(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    family = family_of(model_type)
    silent = tuple(rule.model_copy(update={"remarks": ()}) for rule in family.stacks)
    monkeypatch.setattr("headgram.checkpoints.declared.family_of", lambda _: family.model_copy(update={"stacks": silent}))
    assert "between values and outputs" in (prove(model_type).problem or "")


def test_places_that_a_module_adds_to_what_queries_and_keys_read_must_be_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of("detr")
    silent = tuple(rule.model_copy(update={"remarks": ()}) for rule in family.stacks)
    monkeypatch.setattr("headgram.checkpoints.declared.family_of", lambda _: family.model_copy(update={"stacks": silent}))
    assert "adds places to what queries and keys read" in (prove("detr").problem or "")


@pytest.mark.parametrize("hiding", ["one token", "zeros", "no number"])
def test_what_hides_the_weights_shows_nothing_of_them(hiding: str) -> None:
    x = torch.ones(1 if hiding == "one token" else 3, 8)
    x = x * {"one token": 1, "zeros": 0, "no number": float("nan")}[hiding]
    assert not Call("attention", x[None], x[None], x, x, x).telling
    seen = torch.ones(3, 8)
    assert Call("attention", seen[None], seen[None], seen, seen, seen).telling


def test_keys_that_the_data_calls_queries_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT's queries and keys exchanged, in data instead of code."""
    family = family_of("bert")
    (rule,) = family.stacks
    names = {**rule.modules, "query": rule.modules["key"], "key": rule.modules["query"]}
    wrong = family.model_copy(update={"stacks": (rule.model_copy(update={"modules": names}),)})
    monkeypatch.setattr("headgram.checkpoints.declared.family_of", lambda _: wrong)
    assert prove("bert").residual > 0.1


def test_a_stack_that_the_registry_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of("t5")
    monkeypatch.setattr(
        "headgram.checkpoints.declared.family_of", lambda _: family.model_copy(update={"stacks": family.stacks[:2]})
    )
    assert "belongs to no stack" in (prove("t5").problem or "")


@pytest.mark.parametrize(
    ("model_type", "number", "changes", "sentence"),
    [
        ("llama", 0, {"num_attention_heads": 6}, r"layer 0: tensor layers\.0\S*q_proj\.weight has shape \(48, 48\), but 6 query"),
        ("gpt_neox", 0, {"hidden_size": 40}, r"layer 0: tensor layers\.0\S*query_key_value\.weight has shape \(144, 48\)"),
        ("codegen", 0, {"n_head": 3}, r"layer 0: 3 heads do not divide into the 4 parts"),
        ("deepseek_v3", 0, {"kv_lora_rank": 21}, r"layer 0: tensor layers\.0\S*kv_a_proj_with_mqa\.weight has shape \(24, 48\)"),
        ("llama", 0, {"num_hidden_layers": 3}, r"layer 2: the checkpoint lacks tensor layers\.2\.self_attn\.q_proj\.weight"),
        ("qwen2", 0, {"num_attention_heads": None}, r"does not state num_attention_heads: add it there, or set `heads`"),
        ("llama", 0, {"num_hidden_layers": -1}, r"num_hidden_layers = -1, which should be a whole number of at least 1"),
        ("llama", 0, {"num_hidden_layers": 2**31 - 1}, r"declares 2,147,483,647 layers, which no real model has"),
        ("llama", 0, {"per_layer_config": {"1": {"head_dim": 6}}}, r"changes layers 0 to 1 differently"),
        ("llama", 0, {"per_layer_config": {"01": {"head_dim": 6}}}, r"changes layers 0 to 1 differently"),
        ("zamba2", 0, {"use_shared_attention_adapter": True}, r"adapter = True, a variant whose layout is not known"),
        ("gpt_bigcode", 0, {"multi_query": None}, r"multi_query = None, a variant whose layout is not known"),
        ("llama", 0, {"num_attention_heads": [4, 4]}, r"num_attention_heads = \[4, 4\], which should be a whole number"),
        ("gemma4_text", 0, {"layer_types": ["full_attention"]}, r"should have a list `layer_types` of 6 entries"),
        ("llama", 0, {"model_type": "llamma"}, r"the model type 'llamma' is not known \(the nearest known one is 'llama'\)"),
        ("llava", 0, {"text_config": {}}, r"names no text tower's type"),
    ],
)
def test_a_disagreement_is_one_sentence(
    tmp_path: Path, model_type: str, number: int, changes: dict[str, object], sentence: str
) -> None:
    folder = reconfigured(saved(model_type, tmp_path, number), **changes)
    with pytest.raises(HeadgramError, match=sentence) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_the_true_indices_of_attention_layers_are_kept(tmp_path: Path) -> None:
    with open_checkpoint(saved("nemotron_h", tmp_path)) as checkpoint:
        assert checkpoint.stack("self").layers == (1, 3)


def test_layers_that_borrow_keys_are_left_out(tmp_path: Path) -> None:
    with open_checkpoint(saved("gemma4_text", tmp_path)) as checkpoint:
        assert {stack.name: stack.layers for stack in checkpoint.stacks} == {"sliding": (0, 2), "global": (1, 3)}


def test_groups_of_shared_layers_are_one_layer(tmp_path: Path) -> None:
    with open_checkpoint(saved("albert", tmp_path)) as checkpoint:
        assert checkpoint.stack("self").layers == (0,)


def test_counts_may_have_older_names(tmp_path: Path) -> None:
    """As in BLOOM's published configs."""
    folder = saved("bloom", tmp_path)
    with open_checkpoint(folder) as checkpoint:
        expected = checkpoint.stacks
    older = {"n_embed": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    folder = reconfigured(folder, **older, hidden_size=None, n_head=None, n_layer=None)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.stacks == expected


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_tensor_of_every_layout_is_held_to_its_shape(layout: str) -> None:
    sizes = {"nope": 3, "rope": 2, "key_latent": 6, "query_latent": 7}
    dims = layouts.Dimensions(heads=8, kv_heads=2, rank=5, hidden=11, value_rank=4, output_width=13, sizes=sizes)
    for part in layouts.LAYOUTS[layout]:
        shapes = part.shapes(dims)
        assert tuple(shapes) == part.reads
        names = {role: f"layers.0.{role}" for role in shapes}
        layouts.check_shapes(part, dims, shapes, names)
        for role, shape in shapes.items():
            for wrong in (shape[::-1] if len(shape) > 1 else (*shape, 1), (shape[0] + 1, *shape[1:]), (*shape, 1)):
                with pytest.raises(HeadgramError, match=rf"tensor layers\.0\.{role} has shape {re.escape(str(wrong))}"):
                    layouts.check_shapes(part, dims, {**shapes, role: wrong}, names)


def test_global_heads_may_be_stated_in_either_way(tmp_path: Path) -> None:
    """Published Gemma 4 configs say `global_head_dim`; transformers 5.23 saves `per_layer_config`."""
    folder = saved("gemma4_text", tmp_path)
    with open_checkpoint(folder) as checkpoint:
        expected = checkpoint.stacks
    changes = json.loads((folder / "config.json").read_text())["per_layer_config"]
    padded = {name.zfill(2): change for name, change in changes.items()}  # as it writes them for more than ten layers
    with open_checkpoint(reconfigured(folder, per_layer_config=padded)) as checkpoint:
        assert checkpoint.stacks == expected
    with open_checkpoint(reconfigured(folder, per_layer_config=None, global_head_dim=20)) as checkpoint:
        assert checkpoint.stacks == expected


def test_defaults_are_those_of_transformers() -> None:
    from transformers import CONFIG_MAPPING

    for rule in [rule for family in families() for rule in family.stacks]:
        for model_type, defaults in rule.defaults.items():
            config = CONFIG_MAPPING[model_type]()
            for section in (rule.config or "").split("."):
                # What is left out when a section is saved is the default of its own class, whatever the whole gives it.
                config = type(getattr(config, section))() if hasattr(config, section) else config
            plain = {name: value for name, value in defaults.items() if name not in ROTARY}  # test_around.py is about the others
            config.allow_global_per_layer_attribute_access = True  # single layers may have other counts
            stated = {name: getattr(config, name) for name in plain}
            assert {name: list(value) if isinstance(value, tuple) else value for name, value in stated.items()} == plain


def test_what_a_published_config_leaves_unsaid_is_the_default(tmp_path: Path) -> None:
    """As Gemma 3 4B's does."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model("gemma3_text", hidden_size=32, num_hidden_layers=1, intermediate_size=32, vocab_size=99)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        expected = checkpoint.stacks
    folder = reconfigured(tmp_path, num_attention_heads=None, num_key_value_heads=None, head_dim=None)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.stacks == expected


@pytest.mark.parametrize(("model_type", "old", "new"), OLD_PREFIXES)
def test_prefixes_that_transformers_reads_but_no_longer_writes(tmp_path: Path, model_type: str, old: str, new: str) -> None:
    from transformers import AutoModel

    folder = saved(model_type, tmp_path)
    with open_checkpoint(folder) as checkpoint:
        digests = [checkpoint.digest(stack.name, 0) for stack in checkpoint.stacks]
    renamed(folder, old, new)
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not [key for key in info["missing_keys"] if "_proj" in key]
    with open_checkpoint(folder) as checkpoint:
        assert [checkpoint.digest(stack.name, 0) for stack in checkpoint.stacks] == digests


def test_values_of_width_zero_are_left_out_and_queries_and_keys_are_read(tmp_path: Path) -> None:
    folder = saved("deepseek_v3", tmp_path)
    with open_checkpoint(folder) as checkpoint:
        before = checkpoint.qk("self", 0)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for name, weight in tensors.items():
        if "kv_b_proj" in name:
            tensors[name] = weight.view(heads, -1, weight.shape[1])[:, :nope].flatten(0, 1).contiguous()
        elif "o_proj" in name:
            tensors[name] = weight[:, :0].contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"v_head_dim": 0}))
    with open_checkpoint(folder) as checkpoint:
        (stack,) = checkpoint.stacks
        assert stack.roles == ("query", "key")
        assert stack.missing["value"] == stack.missing["output"] == "the configuration states that its values have the width 0"
        for mine, other in zip(checkpoint.qk("self", 0), before, strict=True):
            assert mine.equal(other)


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import headgram.families.registry", "torch"),
        ("import headgram.families.layouts", "torch"),
        ("from headgram import open_checkpoint; open_checkpoint({folder!r}).qk('self', 0)", "transformers"),
    ],
)
def test_what_is_not_needed_is_not_imported(tmp_path: Path, statement: str, unwanted: str) -> None:
    folder = saved("deepseek_v2", tmp_path)
    code = f"import sys; {statement.format(folder=str(folder))}; assert {unwanted!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("model_type", ["seamless_m4t", "seamless_m4t_v2"])
def test_towers_of_one_configuration_have_counts_of_their_own(tmp_path: Path, model_type: str) -> None:
    """Each of its encoders and decoders has layers and heads under names of its own, which a tiny model might state alike."""
    counts = {"": (3, 4), "speech_": (4, 2), "t2u_": (2, 8)}
    config = tiny_config(model_type, 0, way_of(model_type))
    for tower, (layers, heads) in counts.items():
        setattr(config, f"{tower}encoder_layers", layers)
        setattr(config, f"{tower}encoder_attention_heads", heads)
    config.decoder_layers, config.t2u_decoder_layers = 5, 6
    with quiet():
        model_classes(model_type)[0](config).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        found = {stack.name: (len(stack.layers), stack.heads) for stack in checkpoint.stacks}
    assert found["text_encoder_q_proj"] == counts[""]
    assert found["encoder_speech_encoder_linear_q"] == counts["speech_"]
    assert found["encoder_t2u_model_model"] == counts["t2u_"]
    assert found["speech_encoder_adapter"][1] == counts["speech_"][1]
    assert found["decoder_text_decoder"][0] == 5
    assert found["decoder_t2u_model_model"][0] == 6
