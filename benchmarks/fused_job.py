"""Runs the scripts of several jobs in one process."""

import runpy
import sys
from pathlib import Path

from headgram.run.forkserver import hand_over

hand_over(Path(sys.argv[0]))
for script in snakemake.params.scripts:
    runpy.run_path(script, run_name="__main__")
Path(snakemake.output[0]).touch()
