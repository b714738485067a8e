"""Draw the README's picture from `results/`: python docs/picture.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import headgram

MODEL = "smollm2-135m-instruct"


def main() -> None:
    """Write `docs/smollm2.png`."""
    atlas = headgram.open_atlas("results")
    heads = atlas.heads().query("model == @MODEL")
    cosine = atlas.gram(MODEL, value="cosine")
    plt.rcParams |= {"font.size": 9, "axes.titlesize": 10, "font.family": "DejaVu Sans"}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=[1, 0.62, 1])

    limit = float(np.abs(np.triu(cosine.mean("head"), 1)).max())
    image = left.imshow(cosine.mean("head"), cmap="RdBu_r", vmin=-limit, vmax=limit)
    left.set(title="Cosine of layer pairs, mean over heads", xlabel="layer", ylabel="layer")
    figure.colorbar(image, ax=left, shrink=0.85, extend="max")

    symmetry = heads.pivot(index="layer", columns="head", values="symmetry")
    reach = float(np.abs(symmetry - 0.5).max().max())
    image = middle.imshow(symmetry, cmap="PuOr_r", vmin=0.5 - reach, vmax=0.5 + reach, aspect="auto")
    middle.set(title="Symmetry of every head", xlabel="head", ylabel="layer", xticks=symmetry.columns)
    figure.colorbar(image, ax=middle, shrink=0.85)

    layer = int(symmetry.max(axis=1).idxmax())
    head = int(symmetry.loc[layer].idxmax())
    spectra = atlas.spectra().query("model == @MODEL and layer == @layer")
    for each, rows in spectra.groupby("head"):
        chosen = each == head
        style = {"color": "#b2182b" if chosen else "#bbbbbb", "lw": 1.6 if chosen else 0.8, "zorder": 2 if chosen else 1}
        right.plot(np.sort(rows["symmetric_eigenvalue"])[::-1], label=f"head {head}" if chosen else None, **style)
    right.axhline(0, color="#444444", lw=0.6)
    right.set(
        title=f"Signed spectra, layer {layer}", xlabel="eigenvalues, largest first", ylabel="eigenvalue of the symmetric part"
    )
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("SmolLM2-135M-Instruct, 30 layers × 9 heads", fontsize=11)
    figure.savefig(Path("docs/smollm2.png"), dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    main()
