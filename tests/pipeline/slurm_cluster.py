"""A real Slurm on this machine: munged, slurmctld and two slurmd on loopback, each node with one pretended GPU.

Everything lies in a temporary folder and listens on free ports, so that a Slurm that the machine may have is not touched.
No right of root is needed. The daemons are children of the tests and die with them.
"""

import contextlib
import ctypes
import getpass
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
NODES = {"n1": "/dev/null", "n2": "/dev/zero"}  # Slurm hands out devices that exist; nothing opens these

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
KillWait=2
MinJobAge=3600
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=16000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=16000 Gres=gpu:1
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=n1,n2 MaxTime=INFINITE State=UP
"""
#: Of snakemake: this cluster keeps no accounts, and its jobs end within seconds.
OPTIONS = ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5")


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster: what commands need in their environment, and Slurm's own records."""

    folder: Path
    slurmd: dict[str, subprocess.Popen]  # by node

    def environment(self) -> dict[str, str]:
        """For commands that talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{self.folder}/bin:{_path()}"}

    def run(self, command: str) -> str:
        """The output of a Slurm command."""
        environment = os.environ | self.environment()
        return subprocess.run(shlex.split(command), env=environment, check=True, capture_output=True, text=True).stdout

    def jobs(self) -> dict[str, dict[str, str]]:
        """Slurm's own records of all jobs, by id: JobState, NodeList, Partition, JOB_GRES, Comment, …"""
        lines = self.run("scontrol show job --details --oneliner").splitlines()
        jobs = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if line.startswith("JobId=")]
        return {job["JobId"]: job for job in jobs}

    def completed(self) -> dict[str, dict[str, str]]:
        """What Slurm wrote down when jobs ended, by id."""
        lines = (self.folder / "completed.txt").read_text().splitlines()
        jobs = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
        return {job["JobId"]: job for job in jobs}

    def at_work(self, node: str) -> list[str]:
        """Ids of the jobs whose own snakemake runs on a node.

        Slurm calls a job running before. It sends one that dies while it is launched again, whatever it was told, and
        22.05 loses the GPU of a job that was sent again.
        """
        found = set()
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURMD_NODENAME") == node and "snakemake" in process.cmdline():
                    found.add(environment["SLURM_JOB_ID"])
        return sorted(found, key=int)

    def kill_node(self, node: str) -> None:
        """SIGKILL the node's slurmd, and all that runs on the node, as when its power fails."""
        self.slurmd[node].kill()
        self.slurmd[node].wait()
        tasks = [process for process in self._processes() if process.environ().get("SLURMD_NODENAME") == node]
        steps = [parent for task in tasks if (parent := task.parent()) and parent.name() == "slurmstepd"]
        for process in steps + tasks:  # first those that would report how their job ended
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _is_ours(self, process: psutil.Process) -> bool:
        return any(str(self.folder) in value for value in process.environ().values())

    def _processes(self) -> Iterator[psutil.Process]:
        """Every process that carries this cluster's folder in its environment: daemons' helpers and what jobs started."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and self._is_ours(process):
                    yield process


def missing() -> list[str]:
    """The programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@contextlib.contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Bring up a cluster; take it down, with all its jobs, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="headgram-slurm-"))
    started: list[subprocess.Popen] = []
    cluster = SlurmCluster(folder, {})
    try:
        _write_configuration(folder)
        started.append(_daemon(folder, "munged", "--foreground", "--force", *_munge_files(folder)))
        _wait_for((folder / "munge.socket").exists, "munged", folder)
        started.append(_daemon(folder, "slurmctld", "-D", "-i"))
        for node in NODES:
            cluster.slurmd[node] = _daemon(folder, f"slurmd-{node}", "-D", "-N", node, program="slurmd")
            started.append(cluster.slurmd[node])
        _wait_for(lambda: _idle(cluster) == set(NODES), "the nodes", folder)
        yield cluster
    finally:
        for daemon in reversed(started):
            daemon.kill()
            daemon.wait()
        for process in cluster._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"


def _write_configuration(folder: Path) -> None:
    host = platform.node().split(".")[0]
    (folder / "slurm.conf").write_text(_CONF.format(folder=folder, host=host, user=getpass.getuser(), ports=_free_ports(3)))
    (folder / "gres.conf").write_text("".join(f"NodeName={node} Name=gpu File={file}\n" for node, file in NODES.items()))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    # A step that Snakemake starts drops SLURM_CONF from its environment, but not PATH.
    (folder / "bin").mkdir()
    srun = shutil.which("srun", path=_path())
    (folder / "bin" / "srun").write_text(f'#!/bin/sh\nexport SLURM_CONF={folder}/slurm.conf\nexec {srun} "$@"\n')
    (folder / "bin" / "srun").chmod(0o755)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _munge_files(folder: Path) -> list[str]:
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
    return [f"--{option}={folder / name}" for option, name in files.items()] + [f"--seed-file={folder / 'munge.seed'}"]


def _daemon(folder: Path, name: str, *arguments: str, program: str | None = None) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "CUDA"))}
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    with (folder / f"{name}.out").open("wb") as out:
        return subprocess.Popen(
            [program or name, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  daemons must not outlive the tests
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _idle(cluster: SlurmCluster) -> set[str]:
    with contextlib.suppress(subprocess.CalledProcessError):
        return set(cluster.run("sinfo --noheader --Node --states=idle --format=%N").split())
    return set()


def _wait_for(ready, what: str, folder: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in folder.glob("*.out"))
            raise RuntimeError(f"Slurm's test cluster: {what} did not come up.\n{logs}")
        time.sleep(0.2)
