"""How the columns of `heads` are called and coloured."""

from __future__ import annotations

from dataclasses import dataclass

from headgram.results.tables import SUMMARISED


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes
    ----------
    meaning
        A line for people.
    centre
        The value that is neither the one nor the other, where there is one: its colour is neutral.
    """

    name: str
    label: str
    meaning: str
    centre: float | None = None


_KNOWN = (
    Column("symmetry", "Symmetry", "share of ‖g‖² in the symmetric part: 1 symmetric, 0 antisymmetric", 0.5),
    Column("symmetry_score", "Symmetry score", "1 symmetric, -1 antisymmetric, 0 neither", 0.0),
    Column("directionality", "Directionality", "1: large norms on the right side (queries; reads), -1: on the left", 0.0),
    Column("positive_energy", "Positive energy", "share of the signed spectrum's energy at positive eigenvalues", 0.5),
    Column("stable_rank", "Stable rank", "‖g‖² over the largest singular value squared"),
    Column("effective_rank", "Effective rank", "exponential of the entropy of the squared singular values"),
    Column("fro_sq", "Squared norm", "‖g‖², the sum of the squared singular values"),
    Column("spectral_norm", "Spectral norm", "the largest singular value"),
    Column("nuclear_norm", "Nuclear norm", "sum of the singular values"),
    Column("trace", "Trace", "tr g, the sum of the signed eigenvalues", 0.0),
    Column("self_overlap", "Self-overlap", "⟨g, gᵀ⟩ = tr(g g)", 0.0),
    Column("copying", "Copying", "Σ Re λ / Σ |λ|; 1: a head writes what it reads; by chance 0 on average", 0.0),
    Column("positive", "Positive share", "share of Σ |λ|² at Re λ > 0; by chance 0.5 on average", 0.5),
    Column("departure", "Departure from normality", "if it is near 1, copying says little about the form"),
    Column("trace_z", "Trace against chance", "tr o · √d / ‖o‖", 0.0),
    Column("rotary_norm", "Norm over offsets", "root of the mean of ‖g(Δ)‖² over all offsets of query and key"),
    Column("rotary_still", "Still share", "share of that mean in rows that no rotation touches"),
    Column("rotary_wavelength", "Wavelength", "mean wavelength of what turns with the offset, in tokens, weighted by energy"),
    Column("rotary_sine", "Sine share", "share of what turns that tells before from after"),
    Column("rotary_speed", "Speed", "‖g(1) − g(0)‖ / ‖g(0)‖: a head that tells neighbours apart has a form that turns fast"),
    Column("rotary_beyond", "Beyond the context", "share of energy at wavelengths longer than the context: content, nearly"),
    Column(
        "rotary_positional", "Positional share", "0: scores do not depend on the offset; 1: their mean over offsets is nothing"
    ),
    Column("linear_query", "Linear in the query", "what biases add that only the query's token says, over the form's norm"),
    Column("linear_key", "Linear in the key", "what biases add that only the key's token says, over the form's norm"),
    Column("residual", "Residual", "largest residual of the identities that every result is checked against"),
)


def columns() -> tuple[Column, ...]:
    """All measured columns of `heads`, those that are known by name first."""
    known = {column.name: column for column in _KNOWN}
    named = [column for column in _KNOWN if column.name in SUMMARISED]
    return (*named, *(Column(name, name, "") for name in SUMMARISED if name not in known))
