"""What happens when the Snakefile is read, and when a run begins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock

from headgram.artifacts import remove_temporaries
from headgram.config import load_config
from headgram.errors import HeadgramError
from headgram.lock import Lock, LockedModel, changes, lock_path, missing_rows, read_lock, write_lock
from headgram.manifest import read_manifest
from headgram.plan import Plan, make_plan


class Run:
    """One reading of the Snakefile: the plan, and what starting it for real must do first.

    Reading writes nothing, so a dry run leaves no trace; `begin` does, once jobs are about to run.
    """

    def __init__(self, raw_config: dict[str, Any], scripts: Path) -> None:
        config = load_config(raw_config)
        self._manifest = Path(config.manifest)
        self._results = Path(config.results)
        manifest = read_manifest(self._manifest)
        lock = read_lock(lock_path(self._manifest))
        missing = missing_rows(manifest.rows, lock)
        known = {row.name: lock.models[row.name] for row in manifest.rows if row not in missing}
        changed = [sentence for name, entry in known.items() for sentence in changes(name, entry)]
        self._new, unresolved = _resolve_elsewhere(self._manifest) if missing else ({}, [])
        manifest.check(*changed, *unresolved)
        self.plan: Plan = make_plan({**known, **self._new}, config, scripts)
        self._held: filelock.BaseFileLock | None = None

    def begin(self) -> None:
        """Take the results folder, remove what killed jobs left behind, and write the lock.

        Raises
        ------
        HeadgramError
            If another run holds the results folder, or it cannot be written.
        """
        try:
            self._results.mkdir(parents=True, exist_ok=True)
            self._held = filelock.FileLock(self._results / ".lock", timeout=0)
            self._held.acquire()
            remove_temporaries(self._results)
        except filelock.Timeout:
            raise HeadgramError(
                f"Another run works on {self._results}: wait for it, or give this one another folder (--config results=…)."
            ) from None
        except OSError as error:
            raise HeadgramError(f"The results folder {self._results} cannot be written ({error.strerror or error}).") from None
        if self._new:
            write_lock(lock_path(self._manifest), self._new)


def _resolve_elsewhere(manifest: Path) -> tuple[dict[str, LockedModel], list[str]]:
    """Resolve the missing rows in a process of their own: opening checkpoints imports torch, this process must not."""
    done = subprocess.run([sys.executable, "-m", "headgram.resolve", str(manifest)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise HeadgramError(f"The models of {manifest} could not be resolved: see the error above.")
    answer = json.loads(done.stdout)
    return Lock(models=answer["models"]).models, answer["problems"]
