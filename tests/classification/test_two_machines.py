"""Two machines, played by two network namespaces with a cable between them: restarts, and what a cut cable ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ssm_train.record.checkpoint import Position
from ssm_train.record.store import CheckpointStore

from .conftest import KILLED_ONCE, MAIN

LAUNCHER_TIMEOUT = 20  # seconds
PREFIX = f"ssm{os.getpid() % 10000}"
ADDRESSES = ("10.77.31.1", "10.77.31.2")

pytestmark = pytest.mark.full


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines():
    """Names of two namespaces, whose ends of the cable have the names and ADDRESSES."""
    names = [f"{PREFIX}a", f"{PREFIX}b"]
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need `ip` and root")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "name", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1])
        ip("link", "set", names[1], "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            for device in (name, "lo"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.decode().strip()}")
    yield names
    for name in names:
        ip("netns", "del", name)


@pytest.fixture
def start(machines, tmp_path):
    """start(number, backend, script, *arguments) -> torchrun on that machine."""
    jobs = []

    def begin(number: int, rendezvous: str, script: object, *arguments: object) -> subprocess.Popen:
        name = machines[number]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += ["--nproc_per_node=1", "--max-restarts=2", "--monitor-interval=0.1"]
        settings = f"timeout={LAUNCHER_TIMEOUT}"
        if rendezvous == "static":
            command += [f"--node_rank={number}", f"--master_addr={ADDRESSES[0]}", "--master_port=29531"]
        else:
            command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29531", "--rdzv-id=7"]
            command += [f"--local-addr={ADDRESSES[number]}"]
            settings += f",is_host={int(number == 0)}"
        command += [f"--rdzv-conf={settings}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "GLOO_SOCKET_IFNAME": name}
        log = open(tmp_path / f"machine{number}.log", "w")  # noqa: SIM115, the process has it
        job = subprocess.Popen(
            [*command, str(script), *map(str, arguments)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        jobs.append(job)
        return job

    yield begin
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def log_of(tmp_path, number: int) -> str:
    return (tmp_path / f"machine{number}.log").read_text()


OPTIONS = ("--opts", "TRAIN.EPOCHS", 3, "TRAIN.SAVE_UPDATES", 2, "TIMEOUT", 60)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_worker_of_either_machine(start, tiny_cfg, same_state, read_log, tmp_path, rendezvous, killed):
    """Both machines' launchers start their workers anew, which find each other, and the end is the same to the bit."""
    script, run = tmp_path / "killed_once.py", tmp_path / "run"
    script.write_text(KILLED_ONCE)
    common = ("--cfg", tiny_cfg, "--batch-size", 2, "--resume", "auto")
    jobs = [
        start(number, rendezvous, script, killed, tmp_path / "once", *common, "--output", run, *OPTIONS)
        for number in (0, 1)
    ]
    statuses = [job.wait(timeout=240) for job in jobs]
    assert statuses == [0, 0], log_of(tmp_path, 0)[-3000:] + log_of(tmp_path, 1)[-3000:]
    assert (tmp_path / "once").exists()
    [_, event] = read_log(run, "event")
    assert (event["what"], event["epoch"], event["slot"]) == ("resumed", 1, 2)
    whole = tmp_path / "whole"
    jobs = [
        start(number, rendezvous, script, 9, tmp_path / "never", *common, "--output", whole, *OPTIONS)
        for number in (0, 1)
    ]
    assert [job.wait(timeout=240) for job in jobs] == [0, 0]
    same_state(whole / "checkpoints/last", run / "checkpoints/last")
    assert json.loads((run / "metrics.json").read_text())["processes"] == 2


@pytest.mark.parametrize("how", ["cable", "machine"])
def test_a_cut_cable_or_a_dead_machine_ends_the_others(start, machines, tiny_cfg, tmp_path, how):
    """Within TIMEOUT, with a line that says so; what was saved is whole."""
    options = ("--opts", "TRAIN.EPOCHS", 4000, "TRAIN.SAVE_UPDATES", 2, "TIMEOUT", 10)
    common = ("--cfg", tiny_cfg, "--batch-size", 2, "--resume", "auto", "--output", tmp_path / "run", *options)
    jobs = [start(number, "static", MAIN, *common) for number in (0, 1)]
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/epoch_0001").exists():
        assert time.monotonic() < deadline, log_of(tmp_path, 0)[-3000:] + log_of(tmp_path, 1)[-3000:]
        time.sleep(0.1)
    if how == "cable":
        ip("-n", machines[0], "link", "set", machines[0], "down")
    else:
        # nothing of it says good-bye, as after a power cut
        ip("-n", machines[1], "link", "set", machines[1], "down")
        os.killpg(jobs[1].pid, signal.SIGKILL)
    # torchrun itself waits for its other half, for minutes; the training processes do not
    alive = range(2 if how == "cable" else 1)
    deadline = time.monotonic() + 60
    words = "lost another process of this run, or waited 10 s"
    while not all(f"error: process {number} {words}" in log_of(tmp_path, number) for number in alive):
        assert time.monotonic() < deadline, log_of(tmp_path, 0)[-3000:] + log_of(tmp_path, 1)[-3000:]
        time.sleep(0.1)
    assert CheckpointStore(tmp_path / "run/checkpoints", 3).newest_valid().position >= Position(1)
