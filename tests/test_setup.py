"""The scripts that set up .venv: one at a time."""

import fcntl
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def begin(folder: Path, then: str = "") -> subprocess.CompletedProcess:
    script = f'set -euo pipefail; source "{ROOT}/.ci/environment.sh"; begin_setup python3; {then} echo begun'
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)


def test_two_do_not_set_up_the_environment_at_a_time(tmp_path):
    assert begin(tmp_path).stdout == "begun\n"
    with open(tmp_path / ".setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = begin(tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"error: another process is setting up {tmp_path}/.venv: wait for it and run this command again\n"
    )
    # neither who has finished nor who was killed keeps it
    assert begin(tmp_path).returncode == 0


def test_the_next_one_can_begin_while_the_first_trains(tmp_path):
    again = f"end_setup; bash -c 'source \"{ROOT}/.ci/environment.sh\"; begin_setup python3 && echo again';"
    assert begin(tmp_path, again).stdout == "again\nbegun\n"
