"""What happens when the Snakefile is read, and when a run begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock

from headgram.artifacts import remove_temporaries
from headgram.config import load_config
from headgram.errors import HeadgramError
from headgram.lock import Lock, changed_file, changed_message, lock_path, missing_rows, read_lock, write_lock
from headgram.manifest import read_manifest
from headgram.plan import Plan, make_plan


class Run:
    """One reading of the Snakefile: the plan, and what starting it for real must do first.

    Reading writes nothing, so a dry run leaves no trace; `begin` does, once jobs are about to run.
    """

    def __init__(self, raw_config: dict[str, Any]) -> None:
        config = load_config(raw_config)
        self._manifest = Path(config.manifest)
        self._results = Path(config.results)
        rows = read_manifest(self._manifest)
        lock = read_lock(lock_path(self._manifest))
        known = Lock(models={name: entry for name, entry in lock.models.items() if name not in {r.name for r in missing_rows(rows, lock)}})
        _check_unchanged(known, {row.name for row in rows})
        self._new = _resolve_elsewhere(self._manifest) if missing_rows(rows, lock) else Lock()
        self.plan: Plan = make_plan(rows, Lock(models={**known.models, **self._new.models}), config)
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
            raise HeadgramError(f"Another run works on {self._results}: wait for it, or give this one another folder (--config results=…).") from None
        except OSError as error:
            raise HeadgramError(f"The results folder {self._results} cannot be written ({error.strerror or error}).") from None
        if self._new.models:
            write_lock(lock_path(self._manifest), self._new)


def _check_unchanged(lock: Lock, names: set[str]) -> None:
    changed = [(name, lock.models[name], changed_file(lock.models[name])) for name in sorted(names & set(lock.models))]
    messages = [changed_message(name, entry, file) for name, entry, file in changed if file]
    if messages:
        raise HeadgramError("\n".join(messages))


def _resolve_elsewhere(manifest: Path) -> Lock:
    """Resolve the missing rows in a process of their own: opening checkpoints imports torch, this process must not."""
    command = [sys.executable, "-m", "headgram", "lock", "--manifest", str(manifest), "--dry-run"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise HeadgramError(done.stderr.strip().removeprefix("headgram: "))
    return Lock.model_validate_json(done.stdout)
