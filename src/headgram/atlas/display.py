"""What the command line shows of an atlas: tables with small bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from headgram.errors import HeadgramError
from headgram.foreign import plain
from headgram.forms.variants import Variant

if TYPE_CHECKING:
    import pandas as pd

    from headgram.atlas.compare import Comparison
    from headgram.atlas.reader import Atlas

#: Characters of a line at least. Names are folded to fit into it; a number is never cut.
_WIDTH = 80
_NAME = 16  # characters of a folded name
#: And where there is no terminal: names of models need not be folded.
_WIDE = 160
_KINDS = {"q": "their queries", "k": "their keys", "v": "what they move on"}
_ITS = {"q": "its queries", "k": "its keys", "v": "what it moves on"}
_BAR = " [cyan]"  # begins a bar behind a number
_BAR_WIDTH = 6
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def console() -> Console:
    """Standard output: as wide as the terminal, and at least wide enough for every table."""
    terminal = Console()
    return Console(width=max(terminal.width, _WIDTH) if terminal.is_terminal else _WIDE, emoji=False)


def bar(share: float) -> str:
    """A share between 0 and 1 as a bar, in eighths of a character."""
    eighths = round(8 * _BAR_WIDTH * min(max(share, 0.0), 1.0))
    whole, rest = divmod(eighths, 8)
    return (_EIGHTHS[8] * whole + (_EIGHTHS[rest] if rest else "")).ljust(_BAR_WIDTH)


def _text(value: object) -> str:
    """A stranger's text in a table of ours: no markup, and nothing that a terminal acts on."""
    return escape(plain(value))


def _share(value: float) -> str:
    """A number between 0 and 1, also as a bar."""
    return f"{value:.3f}{_BAR}{bar(value)}[/cyan]"


def _with_bar(value: float) -> str:
    """A number between -1 and 1, and its magnitude as a bar."""
    return f"{value:+.3f}{_BAR}{bar(abs(value))}[/cyan]"


_number, _signed, _plain = "{:.3g}".format, "{:+.3f}".format, "{:.3f}".format
#: How each column of the tables is headed and written; what is not here is a whole number.
_COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "symmetry": ("symmetry", _share),
    "symmetry_median": ("symmetry", _share),
    "symmetry_score_median": ("symmetry score", _signed),
    "layer_symmetry_score": ("layer's\nscore", _signed),
    "directionality": ("direc-\ntional", _signed),
    "directionality_median": ("direc-\ntional", _signed),
    "layer_directionality": ("layer's\nscore", _signed),
    "positive_energy": ("positive\nenergy", _plain),
    "positive_energy_median": ("positive\nenergy", _plain),
    "stable_rank": ("stable\nrank", _number),
    "stable_rank_median": ("stable\nrank", _number),
    "effective_rank": ("eff.\nrank", _number),
    "effective_rank_median": ("eff.\nrank", _number),
    "norm": ("norm", _number),
    "score": ("score", _share),
    "times_chance": ("times\nchance", lambda value: f"{value:.2f}"),
    "acausal": ("beyond\nlater", _plain),
    "value": ("cosine", _with_bar),
    "chance": ("best by\nchance", _plain),
    "first": ("first\nshare", _plain),
    "head_a": ("head\nwrites", str),
    "head_b": ("head\nreads", str),
    "copying": ("copying", _with_bar),
    "positive": ("positive\nshare", _plain),
    "departure": ("from\nnormal", _plain),
    "trace_z": ("trace\nz", lambda value: f"{value:+.1f}"),
    "cosine": ("cosine", _with_bar),
    "cosine_next": ("to the\nnext", _with_bar),
    "cosine_all": ("to\nall", _signed),
    "cosine_adjacent": ("to the\nnext", _signed),
    "z": ("z", lambda value: f"{value:+.1f}"),
    "right": ("right\noverlap", _plain),
    "left": ("left\noverlap", _plain),
    "signed": ("signed\noverlap", _plain),
    "layer_a": ("layer", str),
    "layer_b": ("layer", str),
    "architecture": ("archi-\ntecture", _text),
    "kv_heads": ("key\nheads", str),
    "hidden": ("width", str),
    "stored_dtype": ("stored\nas", _text),
    "lowest_cosine": ("lowest", _signed),
    "change": ("relative\nchange", _number),
    "floor": ("16 bits\nalone", _number),
    "other_layer": ("layer\nbefore", str),
    "other_head": ("head\nbefore", str),
    "margin": ("margin", _signed),
    "symmetry_a": ("symmetry\nbefore", _plain),
    "symmetry_b": ("after", _plain),
    "norm_ratio": ("norm\nratio", _number),
}


def show_models(atlas: Atlas, out: Console) -> None:
    """A line per measured model, circuit and stack."""
    columns = ["model", "circuit", "stack", "architecture", "layers", "heads", "hidden"]
    columns += ["kv_heads", "rank", "stored_dtype", "directionality_median"] if out.width > _WIDTH else []
    columns += ["symmetry_median", "cosine_adjacent"]
    _print(out, "Models: medians over heads, mean cosine to the next layer", atlas.summary(), columns)


def show_model(atlas: Atlas, model: str, stack: str | None, circuit: str, top: int, out: Console) -> None:
    """The layers of a model, its most and least symmetric heads, and the strongest couplings between layers.

    Parameters
    ----------
    stack
        Which stack; all if not given.
    circuit
        `qk` or `ov`.
    top
        Rows of each list of heads.

    Raises
    ------
    HeadgramError
        If the model, the stack or the circuit was not measured.
    """
    for name in [stack] if stack else atlas.stacks(model, circuit):
        couplings = _couplings(atlas, model, name, circuit)
        facts, layers, heads = (atlas.of_heads(table, model, name, circuit) for table in ("models", "layers", "heads"))
        _show_facts(model, facts.iloc[0], out)
        columns = ["layer", "symmetry_median", "layer_symmetry_score", "directionality_median", "layer_directionality"]
        columns += ["positive_energy_median", "stable_rank_median", "effective_rank_median", "cosine_next", "cosine_all"]
        title = "Layers: medians over heads, and scores of the layer's whole form; mean cosine to the next and to all"
        _print(out, title, layers, columns)
        heads = heads.assign(norm=heads["fro_sq"] ** 0.5)
        columns = ["layer", "head", "symmetry", "positive_energy", "directionality", "stable_rank", "effective_rank", "norm"]
        _print(out, "Most symmetric heads", heads.nlargest(top, "symmetry"), columns)
        _print(out, "Least symmetric heads", heads.nsmallest(top, "symmetry"), columns)
        _show_composition(atlas, model, name, top, out)
        if heads["copying"].notna().any():
            columns = ["layer", "head", "copying", "positive", "departure", "trace_z", "norm"]
            _print(out, "Heads that copy most: what they read, they write again", heads.nlargest(top, "copying"), columns)
        if len(couplings):
            strongest = couplings.loc[couplings["cosine"].abs().nlargest(top).index]
            columns = ["layer_a", "layer_b", "head", "cosine", "z", "right", "left", "signed"]
            title = f"Strongest couplings between layers (random subspaces overlap by {facts['overlap_expected'].iloc[0]:.3f})"
            _print(out, title, strongest, columns)


def show_head(atlas: Atlas, model: str, stack: str, circuit: str, layer: int, head: int, top: int, out: Console) -> None:
    """One head: its numbers, the heads that are most like it, the heads that feed it and that read it, and its tokens.

    Raises
    ------
    HeadgramError
        If the model, the stack, the circuit or the head was not measured.
    """
    heads = atlas.of_heads("heads", model, stack, circuit)
    own = heads[(heads["layer"] == layer) & (heads["head"] == head)]
    if own.empty:
        most = f"its heads are {heads['layer'].min()}.{heads['head'].min()} to {heads['layer'].max()}.{heads['head'].max()}"
        raise HeadgramError(f"the stack '{stack}' of '{model}' has no head {layer}.{head}; {most}")
    out.print(f"{plain(model)}, {stack}, {circuit}: layer {layer}, head {head}", markup=False)
    numbers = own.iloc[0].drop(["model", "stack", "circuit", "layer", "head"]).dropna()
    _grid(out, None, ["", ""], [[name, _number(value)] for name, value in numbers.items() if isinstance(value, float)])
    near = atlas.of_heads("neighbours", model, stack, circuit)
    near = near[(near["layer"] == layer) & (near["head"] == head) & (near["measure"] == "cosine")].nsmallest(top, "place")
    near = near.rename(columns={"other_layer": "layer_b", "other_head": "near_head"}).drop(columns=["layer", "head"])
    _print(out, "Heads whose forms are most like it", near, ["layer_b", "near_head", "value", "chance"])
    composed = atlas.table("composition", model)
    sides = (("stack", "b", "writer", "a", "feed", _ITS), ("writer", "a", "stack", "b", "read", _KINDS))
    for own_stack, name, other_stack, other, verb, kinds in sides:
        mine = (composed[own_stack] == stack) & (composed[f"layer_{name}"] == layer) & (composed[f"head_{name}"] == head)
        for kind, rows in composed[mine].groupby("kind", sort=False):
            columns = [other_stack, f"layer_{other}", f"head_{other}", "score", "times_chance", "z", "acausal"]
            columns = columns[1:] if (rows[other_stack] == stack).all() else columns  # cross-attention reads the encoder
            _print(out, f"Heads that {verb} it, by {kinds[str(kind)]}", rows.nlargest(top, "times_chance"), columns)
    if len(atlas.of_heads("tokens", model, stack, circuit)):
        tokens = atlas.tokens(model, layer, head, stack, circuit).iloc[:, :top]
        lines = [
            [f"{side} {direction}", "+" if sign > 0 else "-", " ".join(repr(_text(text)) for text in row)]
            for (side, direction, sign), row in zip(tokens.index, tokens.to_numpy(), strict=True)
        ]
        _grid(out, "Tokens at both ends of its directions", ["direction", "end", "tokens"], lines)
    paths = atlas.table("token_paths", model)
    paths = paths[(paths["stack"] == stack) & (paths["layer"] == layer) & (paths["head"] == head)]
    numbers = ["copying", "positive", "departure", "trace_z"]
    fed = paths[paths["path"] == "k"].astype({"layer_a": "Int32", "head_a": "Int32"})
    own = paths[paths["path"] == Variant.of(circuit).circuit]
    if len(own):
        _print(out, "From token to token", own, numbers)
    if len(fed):
        _print(out, "From token to token, fed by", fed, ["layer_a", "head_a", *numbers])


def _grid(out: Console, title: str | None, names: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(*names, title=title, box=SIMPLE_HEAD, title_justify="left", show_header=any(names))
    for line in lines:
        table.add_row(*line)
    out.print(table)


def _show_composition(atlas: Atlas, model: str, stack: str, top: int, out: Console) -> None:
    """The strongest compositions of each kind, and what flows through them; nothing where none were measured."""
    found = atlas.table("channels", model)
    for kind, rows in found[found["stack"] == stack].groupby("kind", sort=False):
        title = f"Heads that feed later heads, by {_KINDS[str(kind)]}: the strongest compositions of kind {kind}"
        columns = ["writer", "layer_a", "head_a", "layer_b", "head_b", "score", "first", "effective_rank", "copying", "departure"]
        _print(out, title, rows.nsmallest(top, "place"), columns[1:] if (rows["writer"] == stack).all() else columns)


def show_comparison(comparison: Comparison, top: int, out: Console) -> None:
    """What moved between two models: the numbers' medians, the layers, the heads that moved most, and those that swapped."""
    all_heads = comparison.heads
    ratios = _ratios(all_heads["fro_sq_b"] ** 0.5, all_heads["fro_sq_a"] ** 0.5)
    in_tokens = bool(comparison.why_no_drift) and len(comparison.matches) > 0
    if comparison.why_no_drift:
        out.print(f"No cosines: {_text(comparison.why_no_drift)}.", highlight=False, soft_wrap=True)
    after, before = map(_text, (comparison.b, comparison.a))
    for (circuit, stack), heads in all_heads.assign(norm_ratio=ratios).groupby(["circuit", "stack"], sort=False):
        where = f"circuit {_text(circuit)}, stack {_text(stack)}"
        out.print(f"[bold]{after}[/bold] (after) against [bold]{before}[/bold] (before), {where}")
        measures = [name for name in ("cosine", "right", "left", "signed") if name in heads and heads[name].notna().all()]
        if "right" in measures:
            out.print(f"Random subspaces overlap by {heads['expected'].iloc[0]:.3f} on average.", highlight=False)
        out.print(_numbers(heads))
        if measures:
            layers = heads.groupby("layer")[measures].median()
            if "cosine" in measures:
                layers.insert(1, "lowest_cosine", heads.groupby("layer")["cosine"].min())
            _print(out, "Layers (medians over heads)", layers.reset_index(), ["layer", *layers.columns])
        changes = ["change", "floor"] if "cosine" in measures else []
        moved = heads.nsmallest(top, measures[0] if measures else "norm_ratio")
        columns = ["layer", "head", *measures, *changes, "symmetry_a", "symmetry_b", "norm_ratio"]
        if not in_tokens:
            _print(out, "Heads that moved most", moved, columns)
        if len(found := comparison.matches):
            mine = found[(found["circuit"] == circuit) & (found["stack"] == stack)]
            mine = mine[mine["among"] == ("stack" if "stack" in set(mine["among"]) else "layer")]
            if not in_tokens:
                moved = mine[(mine["layer"] != mine["other_layer"]) | (mine["head"] != mine["other_head"])]
                _show_matches("Heads that were another head before", moved, top, out)
            else:
                _show_matches("Heads that are alike in token space", mine, top, out)


def _show_matches(title: str, found: pd.DataFrame, top: int, out: Console) -> None:
    """The matches that are mutual and beyond chance, by how sure they are."""
    likely = found[found["mutual"] & (found["cosine"].abs() > found["chance"])]
    if len(likely):
        columns = ["layer", "head", "other_layer", "other_head", "cosine", "margin"]
        _print(out, title, likely.nlargest(top, "margin"), columns)


def _show_facts(model: str, facts: pd.Series, out: Console) -> None:
    circuit, stack, architecture, dtype = (_text(facts[name]) for name in ("circuit", "stack", "architecture", "stored_dtype"))
    shared = "" if facts["kv_heads"] == facts["heads"] else f", which share {facts['kv_heads']} factors"
    out.print(
        f"[bold]{_text(model)}[/bold], circuit {circuit}, stack {stack}: {architecture}, "
        f"{facts['layers']} layers of {facts['heads']} heads{shared}, "
        f"rank {facts['rank']}, width {facts['hidden']}, stored as {dtype}",
        highlight=False,
    )


def _couplings(atlas: Atlas, model: str, stack: str, circuit: str) -> pd.DataFrame:
    """A row per pair of different layers and head: cosine, z, and overlaps."""
    arrays = [atlas.gram(model, stack, name, circuit) for name in ("cosine", "z")]
    arrays += [atlas.overlap(model, stack, side, circuit) for side in ("right", "left", "signed")]
    frame = arrays[0].to_dataframe()[[]]
    for array in arrays:
        frame[array.name] = array.to_series()
    frame = frame.reset_index()
    return frame[frame["layer_a"] < frame["layer_b"]]


def _numbers(heads: pd.DataFrame) -> Table:
    """The median of every number of the heads, before and after."""
    from headgram.results.tables import HEAD_NUMBERS

    table = _empty("Medians over heads")
    table.add_column("number")
    for heading in ("before", "after", "median change"):
        table.add_column(heading, justify="right")
    for name in (name for name in HEAD_NUMBERS if heads[f"{name}_a"].notna().any()):
        before, after = heads[f"{name}_a"], heads[f"{name}_b"]
        values = (before.median(), after.median(), (after - before).median())
        table.add_row(name, *map(_number, values))
    return table


def _ratios(numerator: pd.Series, denominator: pd.Series) -> pd.Series:
    return (numerator / denominator.where(denominator > 0, 1)).where(denominator > 0, 0)


def _print(out: Console, title: str, rows: pd.DataFrame, columns: Sequence[str]) -> None:
    """Some columns of a frame: where they do not fit, without bars, then closer together, then with folded names."""
    for bars, padding, name in ((True, 1, None), (False, 1, None), (False, 0, None), (False, 0, _NAME)):
        table = _table(title, rows, columns, bars, padding, name)
        needed = Measurement.get(out, out.options.update(max_width=1000), table).minimum
        if needed <= out.width:
            break
    table.width = needed if needed > out.width else None  # then lines go on below
    out.print(table, crop=False, soft_wrap=needed > out.width)


def _table(title: str, rows: pd.DataFrame, columns: Sequence[str], bars: bool, padding: int, name_width: int | None) -> Table:
    table = _empty(title, padding)
    cells = []
    for name in columns:
        heading, write = _COLUMNS.get(name, (name, _text))
        words = rows[name].dtype.kind not in "if"
        width = name_width if words else None
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold", max_width=width)
        written = [write(value) if there else "–" for value, there in zip(rows[name], rows[name].notna(), strict=True)]
        cells.append([text if bars else text.partition(_BAR)[0] for text in written])
    for row in zip(*cells, strict=True):
        table.add_row(*row)
    return table


def _empty(title: str, padding: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, padding))
    table.pad_edge, table.collapse_padding = False, True
    return table
