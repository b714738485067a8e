"""Every registered model type, against the scores that the models themselves compute."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from family_models import reconfigured, saved
from safetensors.torch import load_file, save_file

from headgram.checkpoints.dimensions import find_rules
from headgram.checkpoints.known import open_checkpoint
from headgram.errors import HeadgramError
from headgram.families import layouts
from headgram.families.registry import Family, StackRule, families, family_of, others
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
        patch.setattr("headgram.checkpoints.known.find_rules", recording)
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
            plain = {name: value for name, value in defaults.items() if name not in ROTARY}  # others: test_rotary_encoding.py
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
