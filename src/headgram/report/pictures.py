"""The pictures, as Vega-Lite: for the page, which feeds them, and as figures that hold their data.

Every picture reads named datasets, and its colours are parameters. So it is compiled once: the page and each figure set both.
What is chosen is a dataset, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import altair as alt
import vl_convert

from headgram.report.colours import Colours

Chart = alt.LayerChart
_VEGA_LITE = "6.4"
#: Parameters and their values on white: of what is chosen, of what is not, of frames and around them.
_COLOURS = {"accent": "#c8500a", "quiet": "#8a939c", "ink": "#14181c", "halo": "#ffffff"}
_ACCENT, _QUIET, _INK, _HALO = (alt.ExprRef(name) for name in _COLOURS)
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b6570", "#a39200")
#: As many digits as needed, and no more: axes and bars of numbers of any size.
_NUMBER = """datum.value === 0 || (abs(datum.value) >= 1e-3 && abs(datum.value) < 1e6)
    ? format(datum.value, '.4~r') : replace(format(datum.value, '.3~e'), 'e+', 'e')"""
#: Between two whole numbers nothing is named.
_WHOLE = "datum.value % 1 ? '' : format(datum.value, 'd')"


def heatmap(x: str, y: str, colours: Colours | None = None) -> Chart:
    """Cells of two indices coloured by `value`, and a frame around what is chosen.

    Datasets: `cells` (x, y, value) and `chosen`, which holds x and y, or y alone in a square of layers: a whole row. Without
    colours, their parts are parameters: `domain`, `scheme` and `marks`, which may be null.
    """
    # Labels are short numbers. If they had a limit, drawing would measure each of them once more.
    axis = alt.Axis(labelOverlap=True, labelSeparation=6, labelLimit=0, labelAngle=0, ticks=False, domain=False, grid=False)
    place: dict[str, Any] = {
        "x": alt.X(f"{x}:O", axis=axis, title=x.split("_")[0]),
        "y": alt.Y(f"{y}:O", axis=axis, title=y.split("_")[0]),
    }
    parts = ("domain", "scheme", "marks")
    domain, scheme, marks = (json.dumps(getattr(colours, part)) for part in parts) if colours else parts
    values, called = (f"pluck({marks}, '{place}')" for place in (0, 1))
    scale = alt.Scale(clamp=True, zero=False, nice=False, interpolate="rgb")
    scale["domain"], scale["scheme"] = alt.ExprRef(domain), alt.ExprRef(scheme)
    legend = alt.Legend(orient="bottom", direction="horizontal", tickCount=4, gradientThickness=9, gradientLength=240)
    legend["title"], legend["values"] = colours and colours.note, alt.ExprRef(f"{marks} && {values}")
    legend["labelExpr"] = f"{marks} ? {called}[indexof({values}, datum.value)] : {_NUMBER}"
    cells = alt.Chart(alt.NamedData("cells")).mark_rect()
    frame = {"y": place["y"]} if "_" in y else place
    chosen = alt.Chart(alt.NamedData("chosen")).encode(**frame)
    return _layers(
        cells.encode(**place, color=alt.Color("value:Q", scale=scale, legend=legend)),
        chosen.mark_rect(fillOpacity=0, strokeWidth=4.5, stroke=_HALO),
        chosen.mark_rect(fillOpacity=0, strokeWidth=2, stroke=_INK),
        **({} if colours else dict.fromkeys(parts)),
    )


def spectrum() -> Chart:
    """Spectra of a layer's heads as lines, the chosen head's in front.

    Datasets: `others` and `chosen` (head, index, value).
    """
    place: dict[str, Any] = {
        "x": alt.X(
            "index:Q", title="index", axis=alt.Axis(labelExpr=_WHOLE, grid=False), scale=alt.Scale(nice=False, zero=False)
        ),
        "y": alt.Y("value:Q", title=None, axis=alt.Axis(labelExpr=_NUMBER)),
        "detail": "head:N",
    }
    zero = alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(strokeWidth=1, color=_QUIET).encode(y="zero:Q")
    others = alt.Chart(alt.NamedData("others")).mark_line(strokeWidth=1.2, opacity=0.5, color=_QUIET)
    chosen = alt.Chart(alt.NamedData("chosen")).mark_line(strokeWidth=2.8, color=_ACCENT)
    return _layers(zero, others.encode(**place), chosen.encode(**place))


def profile(depth: str = "relative depth") -> Chart:
    """Median and quartiles over heads along the depth, one colour per series.

    Datasets: `profile` (series, x, q25, median, q75), `chosen` (x) and that of `_chance`.
    """
    x = alt.X("x:Q", title=depth, axis=alt.Axis(grid=False, labelExpr=_NUMBER), scale=alt.Scale(nice=False, zero=False))
    legend = alt.Legend(
        orient="bottom", title=None, labelLimit=320, columns=4, symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1
    )
    colour = alt.Color("series:N", sort=None, legend=legend)
    dash = alt.StrokeDash("series:N", sort=None, legend=None, scale=alt.Scale(range=[[1, 0]]))
    base = alt.Chart(alt.NamedData("profile")).encode(x=x, color=colour)
    y = alt.Axis(labelExpr=_NUMBER)
    band = base.mark_area(opacity=0.16).encode(y=alt.Y("q25:Q", title=None, axis=y, scale=alt.Scale(zero=False)), y2="q75:Q")
    line = base.mark_line(strokeWidth=2.2).encode(y=alt.Y("median:Q", title=None, axis=y), strokeDash=dash)
    points = base.mark_point(filled=True, size=50, opacity=1).encode(y="median:Q")
    chosen = alt.Chart(alt.NamedData("chosen")).mark_rule(strokeDash=[4, 3], strokeWidth=1.2, color=_INK).encode(x="x:Q")
    return _layers(*_chance(), band, chosen, line, points)


def steps() -> Chart:
    """A number of every head of a layer, or of every layer, over the steps of a lineage, the chosen one in front.

    Or of every head over offsets, or by wavelength. Datasets: `others` and `chosen` (line, x, value), `expected` by chance
    (x, value), `now` (x) and that of `_chance`.
    """
    place: dict[str, Any] = {
        "x": alt.X("x:Q", title="step", axis=alt.Axis(grid=False, labelExpr=_NUMBER), scale=alt.Scale(nice=False, zero=False)),
        "y": alt.Y("value:Q", title=None, axis=alt.Axis(labelExpr=_NUMBER), scale=alt.Scale(zero=False)),
        "detail": "line:N",
    }
    others = alt.Chart(alt.NamedData("others")).mark_line(strokeWidth=1.2, opacity=0.5, color=_QUIET)
    now = alt.Chart(alt.NamedData("now")).mark_rule(strokeDash=[4, 3], strokeWidth=1.2, color=_INK).encode(x="x:Q")
    expected = alt.Chart(alt.NamedData("expected")).mark_line(strokeDash=[2, 3], strokeWidth=1.8, color=_INK)
    chosen = alt.Chart(alt.NamedData("chosen")).mark_line(strokeWidth=2.8, color=_ACCENT, point={"size": 22, "color": _ACCENT})
    return _layers(*_chance(), others.encode(**place), now, expected.encode(x=place["x"], y=place["y"]), chosen.encode(**place))


def _chance() -> tuple[alt.Chart, ...]:
    """A grey band with its name: no head lies outside of it by chance. The axis reaches further, so that noise stays flat.

    Dataset: `chance` (name, low, high, from, to), one row or none.
    """
    base = alt.Chart(alt.NamedData("chance"))
    low = alt.Y("low:Q", title=None)
    axis = base.mark_rule(opacity=0).encode(y=alt.Y("from:Q", title=None), y2="to:Q")
    name = base.mark_text(align="right", baseline="top", dx=-2, dy=2, fontSize=10, color=_QUIET)
    band = base.mark_rect(opacity=0.22, color=_QUIET, stroke=_QUIET).encode(y=low, y2="high:Q")
    return axis, band, name.encode(x=alt.value("width"), y=low, text="name:N")


def _layers(*charts: alt.Chart, **parameters: Any) -> Chart:
    chart = alt.layer(*charts).add_params(*(alt.param(name=name, value=value) for name, value in (_COLOURS | parameters).items()))
    configured: Chart = chart.configure(aria=False)  # a label on every cell makes a figure five times as large
    return configured


#: The pictures of the page and of figures.
PICTURES: dict[str, Callable[[], Chart]] = {
    "cells": partial(heatmap, "head", "layer"),
    "square": partial(heatmap, "layer_b", "layer_a"),
    "spectrum": spectrum,
    "profile": profile,
    "steps": steps,
}


@cache
def vega(name: str) -> Mapping[str, Any]:
    """One of `PICTURES` in Vega, which fills its place in the page, and whose datasets are empty.

    No mark answers to the pointer, since the page finds itself what lies under it. The cells of a heatmap overlap by a hair: no
    background shines through where they meet.
    """
    fitted = PICTURES[name]().properties(
        width="container",
        height="container",
        background="transparent",
        autosize={"type": "fit", "contains": "padding", "resize": True},
    )
    spec: dict[str, Any] = vl_convert.vegalite_to_vega(fitted.to_dict(), vl_version=_VEGA_LITE)
    for mark in _marks(spec):
        drawn = mark["encode"]["update"]
        mark["interactive"] = False
        if mark["type"] == "rect" and drawn.get("fill", {}).get("scale") == "color":
            drawn |= {"width": {"signal": "bandwidth('x') + 0.7"}, "height": {"signal": "bandwidth('y') + 0.7"}}
    return spec


def figure(name: str, title: str, datasets: Mapping[str, Any], note: str | None = None, **values: Any) -> str:
    """One of `PICTURES` with its data, in SVG: `width`, `height` and other parameters have these values."""
    picture = vega(name)
    spec = {
        **picture,
        "title": {"text": title, "frame": "group"},
        "background": "white",
        "autosize": "pad",
        "data": _set(picture["data"], "values", datasets),
        "signals": _set(picture["signals"], "value", values),
        "legends": [{**legend, "title": note} for legend in picture["legends"]],
        "config": {**picture["config"], "range": {"category": _SERIES}},
    }
    text: str = vl_convert.vega_to_svg(spec)
    return re.sub(r"\bgradient_\d+", "gradient", text)  # counted over the process, though a figure has one legend at most


def _set(parts: Sequence[Mapping[str, Any]], key: str, values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Signals or datasets, of which those with a value have no other source."""
    return [{"name": each["name"], key: values[each["name"]]} if each["name"] in values else each for each in parts]


def _marks(group: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All marks but groups."""
    for mark in group["marks"]:
        yield from _marks(mark) if mark["type"] == "group" else [mark]


def vega_library() -> str:
    """The Vega runtime in JavaScript, which sets `window.vegaEmbed`."""
    text: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_VEGA_LITE)
    return text
