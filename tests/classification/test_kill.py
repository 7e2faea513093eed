"""Processes that are killed, terminated and restarted, for real."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssm_train import trainer
from ssm_train.cli import main
from ssm_train.common.fileio import folder_lock
from ssm_train.record.checkpoint import Position
from ssm_train.record.store import CheckpointStore

from .conftest import KILLED_ONCE, MAIN

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
KILLS = 12
EPOCHS = 20


@pytest.fixture(scope="module")
def fork():
    """Start `main(arguments)` in a process of its own within milliseconds: everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ssm_train.cli"])
    os.environ["OMP_NUM_THREADS"] = "1"
    # the first child waits for the imports
    first = context.Process(target=int)
    first.start()
    first.join()
    children = []

    def start(*arguments: object) -> multiprocessing.Process:
        child = context.Process(target=main, args=(list(map(str, arguments)),))
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.join()


def until(condition, job: subprocess.Popen | None = None, seconds: float = 300) -> None:
    """Wait for `condition`; fails as soon as `job` has ended without it. The limit is for what hangs, not for speed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert job is None or job.poll() is None, f"ended with {job.returncode}: {job.communicate()}"
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def test_killed_at_random_instants(fork, tiny_cfg, read_log, same_state, tmp_path):
    """SIGKILL while starting, training, validating, saving: what was saved is never lost, and the end is the same."""
    options = ["--cfg", tiny_cfg, "--resume", "auto", "--opts", "TRAIN.EPOCHS", EPOCHS, "TRAIN.SAVE_UPDATES", 2]
    options += ["AUG.MIXUP", 0.8, "AUG.REPROB", 0.5, "MODEL.DROP_PATH_RATE", 0.2]
    folder = tmp_path / "run"
    store = CheckpointStore(folder / "checkpoints", 3)
    chance = random.Random(0)
    saved = Position(0)
    for life in range(KILLS):
        child = fork("--output", folder, *options)
        if life % 4:  # every fourth is killed while it starts
            until(lambda before=saved: max(store.positions(), default=before) > before)
        time.sleep(chance.uniform(0, 0.2))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "the run ended before it was killed often enough"
        newest = max(store.positions(), default=Position(0))
        # renamed into place means complete: the newest folder is valid, and nothing that was saved is lost
        assert newest >= saved and (newest == Position(0) or store.newest_valid().position == newest)
        saved = newest
    last = fork("--output", folder, *options)
    last.join()
    resumed = [Position(e["epoch"], e["slot"]) for e in read_log(folder, "event") if e["what"] == "resumed"]
    assert resumed[-1] == saved
    whole = fork("--output", tmp_path / "whole", *options)
    whole.join()
    same_state(tmp_path / "whole/checkpoints/last", folder / "checkpoints/last")
    one, other = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "whole", folder))
    assert one["results"] == other["results"] and one["results"]["last"]["epoch"] == EPOCHS
    curves = [[e["loss"] for e in read_log(path, "train")] for path in (tmp_path / "whole", folder)]
    assert len(curves[0]) == 5 * EPOCHS and curves[0] == curves[1]
    assert not list(store.folder.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_preemption_saves_and_ends(fork, tiny_cfg, same_state, read_log, tmp_path, capfd, number):
    options = ["--cfg", tiny_cfg, "--opts", "TRAIN.EPOCHS", 8, "TRAIN.SAVE_UPDATES", 0]
    fork("--output", tmp_path / "whole", *options).join()
    run = tmp_path / "run"
    child = fork("--output", run, *options)
    until(lambda: (run / "log.jsonl").exists() and len(read_log(run, "train")) > 7)
    os.kill(child.pid, number)
    child.join(300)
    assert child.exitcode == 0
    [_, event] = read_log(run, "event")
    assert (event["what"], event["signal"]) == ("preempted", number.name)
    position = Position(event["epoch"], event["slot"])
    # the very update that was under way is in it, and no epoch's end was waited for
    assert max(CheckpointStore(run / "checkpoints", 3).positions()) == position
    assert read_log(run, "train")[-1]["update"] == position.epoch * 5 + position.update
    fork("--output", run, "--resume", "auto", *options).join()
    same_state(tmp_path / "whole/checkpoints/last", run / "checkpoints/last")


def trains(log: Path, lines: int, job: subprocess.Popen | None = None) -> None:
    until(lambda: log.exists() and log.read_text().count('"kind": "train"') > lines, job)


def test_ctrl_c_saves_once_and_ends_at_once_the_second_time(tiny_cfg, tmp_path):
    """The terminal sends SIGINT to all processes of the job, loader workers too."""
    command = [sys.executable, str(MAIN), "--cfg", str(tiny_cfg), "--output", str(tmp_path / "run"), "--resume", "auto"]
    command += ["--opts", "TRAIN.EPOCHS", "4000", "TRAIN.SAVE_UPDATES", "0", "DATA.NUM_WORKERS", "2"]
    options = {"start_new_session": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(command, **options, env=ENVIRONMENT)
    trains(tmp_path / "run/log.jsonl", 7, job)
    os.killpg(job.pid, signal.SIGINT)
    # a launcher passes the same Ctrl-C on
    os.kill(job.pid, signal.SIGINT)
    out, err = job.communicate(timeout=300)
    assert (job.returncode, err) == (0, "")
    assert out.splitlines()[-1].startswith("stopped by SIGINT after epoch")
    saved = CheckpointStore(tmp_path / "run/checkpoints", 3).newest_valid().position
    assert saved > Position(1)
    # now with a step that takes for ever
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    job = subprocess.Popen([sys.executable, str(script), *command[2:]], **options, env=ENVIRONMENT)
    until(lambda: (tmp_path / "run/slow").exists(), job)
    os.killpg(job.pid, signal.SIGINT)
    time.sleep(1.2)
    assert job.poll() is None
    os.killpg(job.pid, signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (130, "error: interrupted\n")
    assert CheckpointStore(tmp_path / "run/checkpoints", 3).newest_valid().position == saved


SLOW = """
import sys, time
from pathlib import Path
from ssm_train import trainer
from ssm_train.cli import main

def update(run, *args, **kwargs):
    Path(sys.argv[4], "slow").touch()
    for _ in range(10_000):
        time.sleep(0.1)

trainer.take_update = update
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_before_there_is_anything_to_save():
    """One line, in place of a traceback."""
    code = "from ssm_train.common import command\ndef act(): raise KeyboardInterrupt\nexit(command.run(act))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_the_run_folder_goes_while_the_run_writes_to_it(cli, fails, monkeypatch, tmp_path, how):
    """What was saved stays where it is now; the present state is saved under the old name, unless it is taken."""
    run, elsewhere, original = tmp_path / "run", tmp_path / "elsewhere", trainer.take_update

    def update(training, *args, **kwargs):
        if training.updates == 7:
            shutil.rmtree(run) if how == "removed" else run.rename(elsewhere)
            if how == "replaced":
                run.mkdir()
                (run / "mine").write_text("")
        return original(training, *args, **kwargs)

    options = ("--opts", "TRAIN.EPOCHS", 3)
    monkeypatch.setattr(trainer, "take_update", update)
    words = "was replaced" if how == "replaced" else "epoch 1 and 3 updates is saved in"
    fails("--output", run, *options, parts=(f"{run} was", "while this run wrote to it", words))
    if how != "removed":
        assert CheckpointStore(elsewhere / "checkpoints", 3).newest_valid().position == Position(1)
    if how == "replaced":
        assert (run / "mine").exists() and not (run / "checkpoints").exists()
        return
    monkeypatch.setattr(trainer, "take_update", original)
    outcome = cli("--output", run, "--resume", "auto", *options)
    assert outcome.status == 0 and "resumed after epoch 1 and 3 updates" in outcome.out


def test_preemption_of_a_whole_job(tiny_cfg, tmp_path):
    """A batch system signals all processes of a job, loader workers too: the step is finished all the same."""
    command = [sys.executable, str(MAIN), "--cfg", str(tiny_cfg), "--output", str(tmp_path / "run")]
    command += ["--opts", "TRAIN.EPOCHS", "4000", "TRAIN.SAVE_UPDATES", "0", "DATA.NUM_WORKERS", "2"]
    job = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    until(lambda: (tmp_path / "run/checkpoints/epoch_0001").exists(), job)
    os.killpg(job.pid, signal.SIGTERM)
    out, err = job.communicate(timeout=300)
    assert (job.returncode, err) == (0, "")
    assert out.splitlines()[-1].startswith("stopped by SIGTERM after epoch")
    assert CheckpointStore(tmp_path / "run/checkpoints", 3).newest_valid().position > Position(1)


def test_preemption_of_one_rank_stops_both(tiny_cfg, tmp_path):
    """SIGTERM to one worker under torchrun: both save together and end with 0, and so does the launcher."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(MAIN)]
    command += ["--cfg", str(tiny_cfg), "--batch-size", "2", "--output", str(run)]
    command += ["--opts", "TRAIN.EPOCHS", "4000", "TRAIN.SAVE_UPDATES", "0"]
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: (run / "checkpoints/epoch_0001").exists(), launcher)
    workers = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGTERM)
    out, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, err[-3000:]
    assert "stopped by" in out and "continue with --resume auto" in out


@pytest.mark.full
def test_torchrun_restarts_a_killed_worker(torchrun, tiny_cfg, same_state, read_log, tmp_path):
    """--max-restarts recovers by itself, and the end is that of a run that was never killed."""
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    common = ["--cfg", tiny_cfg, "--batch-size", 2, "--resume", "auto"]
    opts = ["--opts", "TRAIN.EPOCHS", 3, "TRAIN.SAVE_UPDATES", 2]
    (tmp_path / "never").touch()
    done = torchrun(2, 1, tmp_path / "never", *common, "--output", tmp_path / "whole", *opts, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    arguments = [1, tmp_path / "once", *common, "--output", tmp_path / "run", *opts]
    done = torchrun(2, *arguments, script=script, options=("--max-restarts=2",))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "once").exists()
    [_, event] = read_log(tmp_path / "run", "event")
    assert (event["what"], event["epoch"], event["slot"]) == ("resumed", 1, 2)
    same_state(tmp_path / "whole/checkpoints/last", tmp_path / "run/checkpoints/last")


def test_a_folder_in_use_is_refused(fork, fails, tiny_cfg, read_log, tmp_path):
    run = tmp_path / "run"
    child = fork("--cfg", tiny_cfg, "--output", run, "--opts", "TRAIN.EPOCHS", 4000)
    until(lambda: (run / "checkpoints/last").exists())
    parts = (f"{run} is in use by process {child.pid} on", "--tag")
    fails("--output", run, "--resume", "auto", "--opts", "TRAIN.EPOCHS", 4000, parts=parts)
    # and its folder is not moved away under it
    fails("--output", run, "--fresh", "--opts", "TRAIN.EPOCHS", 4000, parts=parts)
    child.kill()
    child.join()
    # the lock dies with its owner
    with folder_lock(run):
        pass
