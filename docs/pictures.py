"""Draw the pictures of README, docs and gallery from `results/`: python docs/pictures.py"""

import contextlib
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colorbar import Colorbar

import headgram
from headgram.geometry.nulls import Null, cosine_null, symmetry_null

SMOLLM2, MINILM = "smollm2-135m-instruct", "all-minilm-l6-v2"
NAMES = {SMOLLM2: "SmolLM2", MINILM: "MiniLM"}
RED, BLUE = "#b2182b", "#2166ac"


def mark_chance(bar: Colorbar, null: Null, count: int) -> None:
    """Lines on a bar of colours between which so many random numbers lie."""
    best = null.best_of(count) - null.mean
    bar.ax.hlines([null.mean - best, null.mean + best], 0, 1, transform=bar.ax.get_yaxis_transform(), color="#14181c", lw=0.8)
    bar.ax.annotate("chance", (0, null.mean), (-3, 0), xycoords=bar.ax.get_yaxis_transform(), textcoords="offset points",
                    rotation=90, ha="right", va="center", fontsize=7)  # fmt: skip


def model(atlas: headgram.Atlas) -> plt.Figure:
    """The README's picture: pairs of layers, symmetry of every head, signed spectra of the most symmetric head's layer."""
    heads = atlas.heads("qk").query("model == @SMOLLM2")
    cosine = atlas.gram(SMOLLM2, value="cosine")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=[1, 0.62, 1])

    width, count = int(heads["hidden"].iloc[0]), len(cosine)
    limit = float(np.abs(np.triu(cosine.mean("head"), 1)).max())
    image = left.imshow(cosine.mean("head"), cmap="RdBu_r", vmin=-limit, vmax=limit)
    left.set(title="Cosine of layer pairs, mean over heads", xlabel="layer", ylabel="layer")
    bar = figure.colorbar(image, ax=left, shrink=0.85, extend="max")
    mark_chance(bar, cosine_null(width).mean_of(heads["head"].nunique()), count * (count - 1) // 2)

    symmetry = heads.pivot(index="layer", columns="head", values="symmetry")
    null = symmetry_null(width)
    reach = float(np.abs(symmetry - null.mean).max().max())
    image = middle.imshow(symmetry, cmap="PuOr_r", vmin=null.mean - reach, vmax=null.mean + reach, aspect="auto")
    middle.set(title="Symmetry of every head", xlabel="head", ylabel="layer", xticks=symmetry.columns)
    mark_chance(figure.colorbar(image, ax=middle, shrink=0.85), null, symmetry.size)

    layer = int(symmetry.max(axis=1).idxmax())
    head = int(symmetry.loc[layer].idxmax())
    spectra = atlas.spectra("qk").query("model == @SMOLLM2 and layer == @layer")
    for each, rows in spectra.groupby("head"):
        chosen = each == head
        style = {"color": RED if chosen else "#bbbbbb", "lw": 1.6 if chosen else 0.8, "zorder": 2 if chosen else 1}
        right.plot(np.sort(rows["symmetric_eigenvalue"])[::-1], label=f"head {head}" if chosen else None, **style)
    right.axhline(0, color="#444444", lw=0.6)
    right.set(
        title=f"Signed spectra, layer {layer}", xlabel="eigenvalues, largest first", ylabel="eigenvalue of the symmetric part"
    )
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("SmolLM2-135M-Instruct, 30 layers × 9 heads", fontsize=11)
    return figure


def kinds(atlas: headgram.Atlas) -> plt.Figure:
    """Three kinds of heads: what their top queries and keys have in common, and their signed spectra."""
    heads = atlas.heads("qk").assign(score=lambda table: (table["symmetry"] - 0.5).abs())
    symmetric = heads[heads["symmetry"] > 0.7]
    chosen = {
        "looks for its like": heads.loc[symmetric["positive_energy"].idxmax()],
        "avoids its like": heads.loc[symmetric["positive_energy"].idxmin()],
        "looks for something else": heads[heads["model"] == SMOLLM2].nsmallest(1, "score").iloc[0],
    }
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.6), layout="constrained", height_ratios=[1, 0.8])
    for (kind, row), (above, below) in zip(chosen.items(), axes.T, strict=True):
        name, layer, head = row["model"], int(row["layer"]), int(row["head"])
        directions = atlas.directions(name)["self"]
        place = directions["layers"].tolist().index(layer)
        image = above.imshow(directions["right"][place, head] @ directions["left"][place, head].T, cmap="RdBu_r", vmin=-1, vmax=1)
        above.set(title=f"{kind}\n{NAMES[name]}, layer {layer}, head {head}", xlabel="key direction")
        spectrum = atlas.spectra("qk").query("model == @name and layer == @layer and head == @head")["symmetric_eigenvalue"]
        bars = np.sort(spectrum / np.abs(spectrum).max())[::-1]
        below.bar(range(len(bars)), bars, width=1, color=np.where(bars > 0, RED, BLUE))
        below.set(ylim=(-1.05, 1.05), xlabel="eigenvalues, largest first")
        below.set_title(f"symmetry {row['symmetry']:.2f}, positive energy {row['positive_energy']:.2f}", fontsize=9)
        below.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("query direction")
    axes[1, 0].set_ylabel("symmetric part,\nof its largest")
    figure.colorbar(image, ax=axes[0, :], shrink=0.85, label="inner product")
    return figure


def draw_gallery(docs: Path) -> None:
    """Run the lines of the gallery's page where its pictures lie."""
    lines = re.findall(r"^>>> (.*)$", (docs / "gallery.md").read_text(), re.MULTILINE)
    results = Path("results").resolve()
    (docs / "gallery").mkdir(exist_ok=True)
    with contextlib.chdir(docs / "gallery"):
        exec("\n".join(lines).replace('"results"', repr(str(results))), {})


PICTURES = {"smollm2.png": model, "kinds.png": kinds}


def main() -> None:
    """Write the pictures beside this file."""
    plt.rcParams |= {"font.size": 9, "axes.titlesize": 10, "font.family": "DejaVu Sans"}
    atlas = headgram.open_atlas("results")
    draw_gallery(Path(__file__).resolve().parent)
    for name, draw in PICTURES.items():
        draw(atlas).savefig(
            Path(__file__).with_name(name), dpi=160 if name == "smollm2.png" else 130, metadata={"Software": None}
        )


if __name__ == "__main__":
    main()
