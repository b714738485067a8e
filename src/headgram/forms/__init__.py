"""Bilinear forms of heads: two factors each, in ordered sets. Knows no file, no model, and nothing of how forms are measured."""
