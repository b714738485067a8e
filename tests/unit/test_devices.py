"""Device leases: one job per device, freed however the job ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from headgram.errors import HeadgramError
from headgram.run.devices import leased_device, require_device, visible_gpus, wants_gpu

HOLDER = """
import os, time
from headgram.run.devices import leased_device
with leased_device(True) as device:
    print(device, os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    time.sleep({seconds})
"""


def start(tmp_path, seconds, devices="3,7"):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": devices, "TMPDIR": str(tmp_path)}
    code = HOLDER.format(seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_two_jobs_get_two_devices_and_a_third_waits_for_a_dead_one(tmp_path):
    first, second = start(tmp_path, 60), start(tmp_path, 60)
    try:
        assert sorted(job.stdout.readline().strip() for job in (first, second)) == ["cuda 3", "cuda 7"]
        third = start(tmp_path, 0)
        time.sleep(1.5)
        assert third.poll() is None
        first.send_signal(signal.SIGKILL)
        assert third.wait(timeout=20) == 0
        assert third.stdout.readline().startswith("cuda ")
    finally:
        for job in (first, second):
            job.kill()
            job.wait()


def test_a_cpu_job_sees_no_device(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with leased_device(False) as device:
        assert device == "cpu"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_gpu_job_on_a_node_without_gpus_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(HeadgramError, match="none is visible"), leased_device(True):
        pass


def test_what_auto_and_cuda_mean(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    assert not require_device("auto")
    assert wants_gpu("cuda")
    with pytest.raises(HeadgramError, match="no GPU is visible"):
        require_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc, 1")
    assert visible_gpus() == ["GPU-abc", "1"]
    assert require_device("auto")
    assert not require_device("cpu")
