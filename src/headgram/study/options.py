"""The configuration: the one source of defaults, validation, JSON schema and documentation.

Nothing here imports torch: the Snakefile reads this module at parse time.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from headgram.errors import HeadgramError
from headgram.foreign import parse_yaml, read_bounded

#: Says what a bad value is; a nested one may be far larger than its text, by aliases.
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
#: More directions or layers than any model has.
MOST = 2**24
#: A configuration file is smaller; reading YAML takes seconds for a megabyte.
_LARGEST = 2**17
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def _parse_bytes(value: Any) -> int:
    is_size = isinstance(value, str | int | float) and not isinstance(value, bool)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value)) if is_size else None
    if not match or match[2].lower() not in _UNITS:
        raise ValueError("a size is a number with a unit, such as '2 GiB' or '512 MiB'")
    return int(min(float(match[1]), 2**60) * _UNITS[match[2].lower()])


def _at_least_64_mib(value: int) -> int:
    if value < 64 * 2**20:
        raise ValueError("at least 64 MiB are needed")
    return value


Bytes = Annotated[
    int,
    BeforeValidator(_parse_bytes),
    AfterValidator(_at_least_64_mib),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer"}]}),
]


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _plain_path(value: str) -> str:
    if not value or {"{", "}", "\0"} & set(value):
        raise ValueError("a name without braces is needed")
    try:
        path = Path(value).expanduser()
        str(path).encode()  # Snakemake remembers files by their names in UTF-8
        lengths = [len(os.fsencode(part)) for part in (str(path), *path.parts)]
    except RuntimeError as error:
        raise ValueError(f"{error}: write the folder out") from None
    except UnicodeEncodeError:
        raise ValueError("a name that can be encoded as UTF-8 is needed") from None
    if lengths[0] > 4000 or max(lengths[1:], default=0) > 255:
        raise ValueError("no system has names as long as that")
    return str(path)


def _each_once(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) < len(value):
        raise ValueError("a list is needed that holds each entry once")
    return value


def _at_least_one(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value:
        raise ValueError("at least one is needed")
    return value


_NUMBER = BeforeValidator(_no_truth_value)
Circuits = Annotated[tuple[Literal["qk", "ov"], ...], AfterValidator(_each_once), AfterValidator(_at_least_one)]
Pairs = Annotated[tuple[Literal["neighbours", "first", "last", "all"], ...], AfterValidator(_each_once)]
LayerCount = Annotated[Annotated[int, Field(ge=1, le=MOST)] | Literal["auto"], _NUMBER]
#: A path, of which Snakemake makes names of files: its wildcards are written in braces.
PlainPath = Annotated[str, AfterValidator(_plain_path)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_NORM = {"type": "string", "enum": ["raw", "folded"]}
Norms = Annotated[
    tuple[Literal["raw", "folded"], ...],
    BeforeValidator(_as_list),
    AfterValidator(_each_once),
    AfterValidator(_at_least_one),
    WithJsonSchema({"anyOf": [_NORM, {"type": "array", "items": _NORM}]}),
]
#: No context is longer.
_Offset = Annotated[int, _NUMBER, Field(ge=-(2**30), le=2**30)]
Offsets = Annotated[tuple[_Offset, ...], AfterValidator(_each_once), AfterValidator(_at_least_one)]


class Weights(_Section):
    """How weights are kept after extraction."""

    dtype: Literal["stored", "bfloat16", "float32"] = Field(
        "stored",
        description="What extraction rounds the weights to. `stored` keeps the checkpoint's own precision "
        "(quantised tensors are dequantised to float32).",
    )
    norm: Norms = Field(
        ("raw",),
        description="What is measured: weights as they are stored (`raw`), or with the gains of norms folded in (`folded`). "
        "Give one word, or a list of both. Folded forms are further rows of the same tables, `qk-folded` and `ov-folded`. If "
        "folding is not proven for a model, the run says so.",
    )


class Eigen(_Section):
    """The spectrum of every head."""

    topk: Annotated[int, _NUMBER] = Field(
        8,
        ge=1,
        le=MOST,
        description="Directions kept per head: right, left and signed. At most the head's rank.",
    )
    tolerance: Annotated[float, _NUMBER] = Field(
        1e-9,
        gt=0,
        le=MOST,
        allow_inf_nan=False,
        description="The largest residual of the identities that a result may have. Above it the job stops "
        "and names model, layer and head. Residuals are relative to `sum ‖q_i‖ ‖k_i‖` over the rows and are near 1e-14.",
    )
    layers_per_job: LayerCount = Field(
        "auto",
        description="Layers measured by one job. `auto` sizes a job to outweigh its start-up and to fit the memory budget.",
    )


class Gram(_Section):
    """The Frobenius inner products of pairs of heads."""

    layers_per_tile: LayerCount = Field(
        "auto",
        description="Layers along one side of a tile. One job computes one row of tiles and resumes tile by tile.",
    )
    pairs: Literal["auto", "all", "same"] = Field(
        "auto",
        description="Which heads are multiplied: all with all, or those of the same index in every two layers. `auto` takes "
        "all, unless that costs more than 2e14 operations, about an hour on one core. A model of 70B costs more; then `auto` "
        "takes the same index only, and the run says so.",
    )
    precision: Literal["auto", "float64"] = Field(
        "auto",
        description="Precision of the products. `auto` takes float32 if the weights have no more precision and no form is too "
        "small for it; errors are then below `1e-6 ‖g_a‖ ‖g_b‖`, and near 1e-8 in practice. Otherwise it takes float64.",
    )


class RotaryOffsets(_Section):
    """Forms at offsets of query and key."""

    offsets: Offsets = Field(
        (0,),
        description="The offsets at which forms of `qk` are measured: how many tokens the query comes after the key. Forms at "
        "offsets other than 0 are further rows of the same tables, such as `qk@8`. The tables `rotary` and `frequencies` are "
        "always written.",
    )


class Lineage(_Section):
    """Models that belong together, compared two by two."""

    pairs: Pairs = Field(
        ("neighbours", "first"),
        description="Which models of a lineage are compared, in the order of their steps: each with its predecessor "
        "(`neighbours`), all with the `first`, all with the `last`, or `all` with all. Give a list of these; it may be empty.",
    )
    basis: Literal["residual", "tokens"] = Field(
        "residual",
        description="What the models of a lineage share. Checkpoints of one training share their residual stream: `residual`. "
        "Independent models, also of other widths, layers and heads, share tokens of the same text: `tokens`. Then embeddings "
        "and tokenizers are read, and heads are matched by what they do with the tokens that both models have.",
    )


class Composition(_Section):
    """Which heads write what later heads read."""

    enabled: bool | Literal["auto"] = Field(
        "auto",
        description="Write the tables `composition`, `channels` and `kernels` of every stack that is measured in both circuits. "
        "`auto` writes them unless that costs more than 2e14 operations; then the run says so.",
    )
    strongest: Annotated[int, _NUMBER] = Field(
        64,
        ge=0,
        description="How many of the strongest pairs of each kind the table `channels` has. It measures their composed forms.",
    )


class Tokens(_Section):
    """The tokens that directions read and write."""

    enabled: bool = Field(
        False,
        description="Write the tables `tokens` and `token_paths`. This reads embeddings, slice by slice. For a model at the hub "
        "they are far larger than all else that is fetched.",
    )
    count: Annotated[int, _NUMBER] = Field(5, ge=1, le=1000, description="Tokens kept at either end of every direction.")


class Original(_Section):
    """The two files that the original script writes, number for number."""

    enabled: bool = Field(
        True,
        description="Write `seed/{model}.json` and `seed/{model}-eigdirs.pt`, if the circuit `qk` is measured.",
    )


class Export(_Section):
    """How the merged tables are written."""

    compression: Literal["zstd", "snappy", "none"] = Field("zstd", description="Compression of the Parquet files of the atlas.")


class Report(_Section):
    """The page and the figures that show all models."""

    enabled: bool = Field(
        True,
        description="Write `report/` when all models are measured. `snakemake results/report/index.html` always writes it.",
    )


class Config(_Section):
    """Every option of headgram."""

    manifest: PlainPath = Field(
        "config/models.tsv",
        description="The table of models. Its lock lies beside it: `models.tsv` has `models.lock.json`.",
        min_length=1,
    )
    results: PlainPath = Field("results", description="The folder that receives every artifact.")
    circuits: Circuits = Field(
        ("qk", "ov"),
        description="Which circuits of heads are measured: `qk`, what it looks for (`W_K^T W_Q`), and `ov`, what it moves "
        "(`W_O W_V`). A model whose values or outputs cannot be read is measured without `ov`, and the run says so.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where eigen and Gram jobs compute. `auto` takes a GPU if one is visible.",
    )
    memory_budget: Bytes = Field(
        2 * 2**30,
        description="The memory that one job may take. The `auto` sizes of shards and tiles follow from it.",
    )
    weights: Weights = Field(default_factory=Weights, description=Weights.__doc__)
    eigen: Eigen = Field(default_factory=Eigen, description=Eigen.__doc__)
    gram: Gram = Field(default_factory=Gram, description=Gram.__doc__)
    rotary: RotaryOffsets = Field(default_factory=RotaryOffsets, description=RotaryOffsets.__doc__)
    lineage: Lineage = Field(default_factory=Lineage, description=Lineage.__doc__)
    composition: Composition = Field(default_factory=Composition, description=Composition.__doc__)
    tokens: Tokens = Field(default_factory=Tokens, description=Tokens.__doc__)
    original: Original = Field(default_factory=Original, description=Original.__doc__)
    export: Export = Field(default_factory=Export, description=Export.__doc__)
    report: Report = Field(default_factory=Report, description=Report.__doc__)


def read_options(path: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a YAML file, if there is one, overruled by those that were given otherwise.

    Plain data: Snakemake's own reader would evaluate templates in the file, which are code.

    Raises
    ------
    HeadgramError
        If the file is not plain YAML with keys at its top level.
    """
    try:
        content = parse_yaml(read_bounded(path, _LARGEST)) if path else None
    except FileNotFoundError:
        content = None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise HeadgramError(f"{path} cannot be read as plain YAML ({reason:.300}).") from None
    if not isinstance(content, Mapping | None):
        raise HeadgramError(f"{path} holds no options: write `key: value` lines.")
    return _overruled(content or {}, given)


def _overruled(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the given ones first; sections are joined key by key."""
    joined = {**options, **given}
    for key in options.keys() & given.keys():
        if isinstance(options[key], Mapping) and isinstance(given[key], Mapping):
            joined[key] = _overruled(options[key], given[key])
    return joined


def load_config(raw: dict[str, Any]) -> Config:
    """Validate a configuration as Snakemake hands it over.

    Raises
    ------
    HeadgramError
        One sentence that names every unknown key (with the nearest known one) and every bad value.
    """
    try:
        # A section whose keys are all commented out is YAML's null.
        return Config.model_validate({key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise HeadgramError(f"The configuration is not valid: {problems}.") from None


def _brief(value: Any) -> str:
    try:
        return f"{_BRIEF.repr(value):.200}"
    except ValueError:  # Python writes no number of many thousand digits
        return "a number of thousands of digits"


def _describe(problem: Any) -> str:
    # A union's error path ends in the name of the branch that was tried; only our own keys matter.
    names = [part if isinstance(part, str) else _brief(part) for part in problem["loc"]]
    path = [name for name in names if name in known_keys() or problem["type"] == "extra_forbidden"]
    key = ".".join(path)
    if problem["type"] != "extra_forbidden":
        given = _brief(problem["input"])
        wrong = problem["msg"].removeprefix("Value error, ").replace("a valid tuple", f"a list, such as [{given}]")
        return f"{key} = {given}: {wrong}"
    near = difflib.get_close_matches(path[-1], known_keys(), n=1, cutoff=0.5)
    full = [name for name in option_paths() if near and name.split(".")[-1] == near[0]]
    hint = f" (did you mean '{full[0]}'?)" if full else ""
    return f"unknown key '{key}'{hint}"


def option_paths(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all sections and options, in the order of declaration."""
    paths = []
    for name, field in model.model_fields.items():
        paths.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += option_paths(field.annotation, f"{prefix}{name}.")
    return paths


def known_keys() -> list[str]:
    """Last parts of `option_paths`, without repeats."""
    return list(dict.fromkeys(path.split(".")[-1] for path in option_paths()))
