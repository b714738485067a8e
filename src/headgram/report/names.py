"""What is rendered of a model, and what the figures are called. Imports nothing: the Snakefile reads it."""

#: The tables that a rendering reads.
TABLES = ("heads", "spectra", "gram", "overlap", "layers", "models", "neighbours", "pairs")

#: Cells along a side of the matrix of all heads that a page holds at most. Of more heads, the rows of every layer lie beside it.
DRAWN = 512

#: Figures of every stack of a model.
STACK_FIGURES = {
    "symmetry": "Symmetry of every head",
    "cosine": "Cosine of layer pairs, mean over heads",
    "overlap-right": "Overlap of layer pairs on the right side (queries; reads), mean over heads",
    "overlap-left": "Overlap of layer pairs on the left side (keys; writes), mean over heads",
    "overlap-signed": "Overlap of layer pairs in signed directions, mean over heads",
}
#: Columns of `heads` whose way along the depth is drawn.
PROFILE_FIGURES = {
    "symmetry_score": "Symmetry score",
    "directionality": "Directionality",
    "positive_energy": "Positive energy",
    "stable_rank": "Stable rank",
}
