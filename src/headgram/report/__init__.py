"""The page and the figures that show an atlas: tables in, HTML and SVG out. Knows no Snakemake."""
