"""Mathematics on tensors. Knows no file, no model and no Snakemake."""
