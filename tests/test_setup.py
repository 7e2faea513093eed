"""The scripts that set up .venv: one at a time, and with a torch that fits the machine."""

import fcntl
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

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


# ---- which torch -----------------------------------------------------------------------------------------------------

PIP = """#!/usr/bin/env bash
# Stands for .venv/bin/python: writes down what pip is asked for.
case "$*" in
    *"import torch"*) [ -e has_torch ] && echo 2.11.0+cpu ;;
    *urllib*) shift; exec {python} "-c" "$@" ;;
    *"pip check"*) echo "No broken requirements found." ;;
    *--index-url*) echo "$*" >>asked; [ ! -e broken_index ] ;;
    *-r*) echo "$*$(grep -v "^#" "${@: -1}" | sed "s/^/|/" | tr -d "\\n")" >>asked ;;
    *) echo "$*" >>asked ;;
esac
"""


class Index(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/torch/" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def index():
    """The address of a package index with torch in it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def install(folder: Path, index: str, driver: bool = False, **environment: str) -> tuple[int, str, list[str]]:
    """Status and output of install_environment where `index` stands for PyTorch's, and what pip was asked for."""
    stub = folder / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text(PIP.replace("{python}", sys.executable))
    stub.chmod(0o755)
    (folder / "requirements.txt").write_text(
        "# torch\ntorch==2.11.0\ntorchvision==0.26.0\ntriton==3.6.0\ntimm==1.0.31\n"
    )
    script = f'''set -euo pipefail; source "{ROOT}/.ci/environment.sh"
        cpu_torch={index}; patience=2; environment_key() {{ echo key; }}
        has_nvidia_driver() {{ {str(driver).lower()}; }}
        uname() {{ echo Linux; }}
        install_environment'''
    known = {key: value for key, value in os.environ.items() if key != "TORCH_INDEX_URL"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60, env=known | environment
    )
    asked = folder / "asked"
    return done.returncode, done.stdout, asked.read_text().splitlines() if asked.exists() else []


def test_without_a_driver_torch_comes_without_cuda(tmp_path, index):
    status, said, asked = install(tmp_path, index)
    assert status == 0 and len(asked) == 3
    assert asked[0].endswith(f"--index-url {index} torch==2.11.0 torchvision==0.26.0")
    assert "--index-url" not in "".join(asked[1:])  # everything else as ever
    assert asked[1].split("|")[1:] == ["torch==2.11.0", "torchvision==0.26.0", "triton==3.6.0", "timm==1.0.31"]
    assert f"taking torch from {index}; TORCH_INDEX_URL=URL names another" in said
    assert "keeping" not in said


def test_a_torch_that_is_there_is_kept(tmp_path, index):
    (tmp_path / "has_torch").touch()
    status, said, asked = install(tmp_path, index)
    assert status == 0 and "keeping the torch that is in .venv: 2.11.0+cpu" in said and "taking" not in said
    assert asked[0].split("|")[1:] == ["timm==1.0.31"]


@pytest.mark.parametrize("why", ["driver", "refused", "silent", "not there"])
def test_else_torch_comes_from_pips_own_index(tmp_path, index, why):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # does not listen: connections are refused
        if why == "silent":
            listener.listen()
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
        other = {"driver": index, "not there": f"{index}/nowhere"}.get(why, nobody)
        status, said, asked = install(tmp_path, other, driver=why == "driver")
    assert status == 0 and len(asked) == 2 and "--index-url" not in "".join(asked)
    assert "taking torch" not in said


def test_an_index_that_breaks_off_does_not_end_the_first_run(tmp_path, index):
    (tmp_path / "broken_index").touch()
    status, said, asked = install(tmp_path, index)
    assert status == 0 and len(asked) == 3 and f"torch cannot be had from {index}: taking pip's own index" in said


def test_a_variable_names_the_index(tmp_path, index):
    status, said, asked = install(tmp_path, index, driver=True, TORCH_INDEX_URL="https://example.org/cu126")
    assert status == 0 and "--index-url https://example.org/cu126 torch==2.11.0" in asked[0]
    (tmp_path / "asked").unlink()
    assert install(tmp_path, index, TORCH_INDEX_URL="")[2][0].find("--index-url") == -1
    (tmp_path / "asked").unlink()
    (tmp_path / "broken_index").touch()
    status, said, asked = install(tmp_path, index, TORCH_INDEX_URL="https://example.org/cu126")
    assert status == 1 and len(asked) == 1  # who names one wants that one


def test_what_is_a_driver(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    script = f'source "{ROOT}/.ci/environment.sh"; has_nvidia_driver'
    with_tool = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", "-c", script], env=with_tool, timeout=60).returncode == 0
