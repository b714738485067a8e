# Every rule's script: starts a job, and tells it on its standard input what its rule told Snakemake.
exec "$HEADGRAM_PYTHON" -I -S "$HEADGRAM_START" "${snakemake[scriptdir]}/${snakemake_params[script]}.py" "${snakemake_log[0]}" \
    <<< "${snakemake_params[job]}"
