"""The configuration: validation, and the files that are generated from it."""

import json
from pathlib import Path

import pytest
import yaml

from headgram.errors import HeadgramError
from headgram.study.options import Config, load_config, read_options
from headgram.study.options_docs import SCHEMA_PATH, TABLE_PATH, readme_text, schema_text

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"eign": {}}, r"unknown key 'eign' \(did you mean 'eigen'\?\)"),
        ({"eigen": {"top_k": 4}}, r"unknown key 'eigen\.top_k' \(did you mean 'eigen\.topk'\?\)"),
        ({"topk": 4}, r"unknown key 'topk' \(did you mean 'eigen\.topk'\?\)"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"eigen": {"topk": 0}}, r"eigen\.topk = 0"),
        ({"eigen": {"topk": "many"}}, r"eigen\.topk = 'many'"),
        ({"eigen": {"topk": True}}, r"eigen\.topk = True"),
        ({"eigen": {"tolerance": float("inf")}}, r"eigen\.tolerance = inf"),
        ({"results": "a{b}"}, r"results = 'a\{b\}'"),
        ({"eigen": {"tolerance": -1}}, r"eigen\.tolerance = -1"),
        ({"gram": {"layers_per_tile": 0}}, r"gram\.layers_per_tile = 0"),
        ({"memory_budget": "plenty"}, "memory_budget = 'plenty'.*2 GiB"),
        ({"memory_budget": "1 MiB"}, "at least 64 MiB"),
        ({"eigen": 3}, "eigen = 3"),
        ({"manifest": ""}, "manifest = ''"),
        ({"lineage": {"pairs": "all"}}, r"lineage\.pairs = 'all': Input should be a list, such as \['all'\]"),
        ({"circuits": "qk"}, r"circuits = 'qk': Input should be a list, such as \['qk'\]"),
        ({"rotary": {"offsets": 8}}, r"rotary\.offsets = 8: Input should be a list, such as \[8\]"),
    ],
)
def test_bad_keys_are_named(raw, words):
    with pytest.raises(HeadgramError, match=words) as error:
        load_config(raw)
    assert "\n" not in str(error.value)


def test_every_problem_is_named_at_once():
    with pytest.raises(HeadgramError, match="'eign'.*'grams'|'grams'.*'eign'"):
        load_config({"eign": {}, "grams": {}})


@pytest.mark.parametrize(("text", "size"), [("2 GiB", 2 * 2**30), ("512MiB", 512 * 2**20), (2**30, 2**30), ("1.5 GB", 1.5e9)])
def test_sizes_have_units(text, size):
    assert load_config({"memory_budget": text}).memory_budget == size


def test_empty_sections_and_trailing_slashes_are_forgiven():
    config = load_config({"eigen": None, "results": "out/"})
    assert config.eigen == Config().eigen
    assert config.results == "out"


def test_the_shipped_configuration_holds_every_default():
    shipped = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    assert load_config(shipped) == Config()

    def names(model, values):
        return {name: names(field.annotation, values[name]) if name in values and isinstance(values[name], dict) else None
                for name, field in model.model_fields.items()}  # fmt: skip

    def given(values):
        return {name: given(value) if isinstance(value, dict) else None for name, value in values.items()}

    assert given(shipped) == names(Config, shipped)


def test_schema_and_option_table_are_up_to_date():
    assert (ROOT / SCHEMA_PATH).read_text() == schema_text(), "run `make config-docs`"
    readme = (ROOT / TABLE_PATH).read_text()
    assert readme == readme_text(readme), "run `make config-docs`"


def test_the_schema_accepts_the_shipped_configuration_and_refuses_unknown_keys():
    import jsonschema

    schema = json.loads(schema_text())
    jsonschema.validate(yaml.safe_load((ROOT / "config" / "config.yaml").read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"eign": 1}, schema)


HUGE = f"0x{'f' * 5000}"


@pytest.mark.parametrize(
    "text",
    [
        *(f"{option}: {HUGE}" for option in ("device", "memory_budget", "manifest", "results", "eigen")),
        *(f"{section}: {{{option}: {value}}}" for value in (HUGE, "-1", "1e999", "[1]", "{a: b}", f"{{? {HUGE} : 1}}")
          for section, option in (("eigen", "topk"), ("eigen", "tolerance"), ("gram", "layers_per_tile"))),
        *(f"{option}: {value}" for option in ("manifest", "results")
          for value in ("x" * 5000, "a/" * 3000, "~nobody-of-this-name", r'"\ud800"', r'"\udc80"', r'"\0"', '""', "1", "[a]")),
        f"? {HUGE}\n: 1",
        "1: 2",
    ],
)  # fmt: skip
def test_an_absurd_value_is_answered_by_one_sentence(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(HeadgramError) as caught:
        load_config(read_options(tmp_path / "config.yaml", {}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
