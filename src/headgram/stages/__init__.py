"""One module per stage of the pipeline: what a job does, between its files. Called by the scripts of the same names."""
