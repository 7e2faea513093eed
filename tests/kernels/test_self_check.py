"""What a GPU implementation must pass before it is used, without a GPU: the process that checks runs the compiled CPU
implementation in the GPU's place, spoilt in the ways in which a kernel goes wrong."""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch

from ssm_ops import __main__ as doctor
from ssm_ops import _library, _native, _self_check, _trust
from ssm_ops._library import OPERATORS, why_unavailable
from tests.kernels.common import passed_under_the_interpreter

CUDA = torch.device("cuda", 0)
SCAN = OPERATORS["selective_scan"]
BUILT = pytest.mark.skipif(bool(why := why_unavailable(SCAN, "cpu", "cpu")), reason=str(why))

NO_CODE = "RuntimeError: no kernel image is available for execution on the device"
VERDICTS = {
    "right": (None, False),
    "raises": (NO_CODE, False),
    "no_memory": ("OutOfMemoryError: CUDA out of memory", True),
}
"""What the process that checks may say of an implementation."""

CHILD = """
import os, random, signal, sys, time
import torch
from ssm_ops import _self_check
from ssm_ops.selective_scan.impl import cpu

forward, backward = cpu.forward, cpu.backward

def spoilt(*args):
    result = forward(*args)
    {fault}
    return result

def spoilt_backward(*args):
    result = backward(*args)
    result[3].mul_(1.01)  # of B
    return result

cpu.forward = spoilt
if {gradient}:
    cpu.backward = spoilt_backward
_self_check.main("cpu", sys.argv[2].replace(":cuda", ":cpu").replace(":triton", ":cpu"))
"""


class Machine:
    """`asked` are the pairs that were checked; `faults` what the check of an implementation meets."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.faults = {"cuda": "right", "triton": "right"}

    def restart(self) -> None:
        """What a process knows is gone; its files are not."""
        self.asked.clear()
        _trust._problem.cache_clear()
        _library._WARNED.clear()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with one GPU and everything built, and no verdict yet."""
    made = Machine()

    def ask(device, pair, seconds=_trust.SECONDS):
        made.asked.append(pair)
        return VERDICTS[made.faults[pair.split(":")[1]]]

    monkeypatch.setattr(_trust, "ask", ask)
    monkeypatch.setattr(_trust, "probe", lambda index: None)
    monkeypatch.setattr(_trust, "_driver", lambda: "driver 550.54")
    monkeypatch.setattr(_trust, "_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_library, "_MISSING", {})
    monkeypatch.setattr(_library, "DEFAULT_IMPL", "auto")
    monkeypatch.setattr(_library, "_WARNED", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(_trust.VARIABLE, raising=False)
    _trust._problem.cache_clear()
    yield made
    _trust._problem.cache_clear()


def taken(impl: str = "auto") -> tuple[str, list[str]]:
    """What is chosen, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        name = _library.resolve(SCAN, impl, CUDA, torch.float32)
    return name, [str(w.message) for w in caught]


def test_what_passes_is_used_and_remembered(machine, caplog, tmp_path):
    assert taken() == ("cuda", [])
    assert machine.asked == ["selective_scan:cuda"]
    assert "runs on this NVIDIA H100 for the first time" in caplog.text
    assert taken() == taken("cuda") == ("cuda", []) and len(machine.asked) == 1  # by this process
    [file] = tmp_path.rglob("*.*")
    held = json.loads(file.read_text())
    assert held["identity"].startswith("NVIDIA H100 | driver 550.54 | torch ") and file.parent.name == "self_check"
    assert held["pair"] == "selective_scan:cuda" and held["fault"] is None
    machine.restart()
    assert taken() == ("cuda", []) and machine.asked == []  # by the file
    assert taken("triton") == ("triton", []) and machine.asked == ["selective_scan:triton"]


def test_what_fails_is_not_used(machine):
    """The next one is, with one warning; asking for it by name raises; the file knows."""
    machine.faults["cuda"] = "raises"
    name, [message] = taken()
    assert name == "triton" and machine.asked == ["selective_scan:cuda", "selective_scan:triton"]
    assert message == (
        f"ssm_ops: selective_scan does not use cuda on cuda:0: it failed its self-check ({NO_CODE}); "
        "`python -m ssm_ops --check` asks again, SSM_OPS_SELF_CHECK=0 uses it all the same"
    )
    assert taken() == ("triton", [])
    with pytest.raises(RuntimeError, match=f"impl='cuda' is not available on cuda:0: it failed its .*{NO_CODE}"):
        taken("cuda")
    machine.restart()
    assert taken() == ("triton", [message]) and machine.asked == []


def test_what_may_pass_is_not_remembered(machine):
    machine.faults["cuda"] = machine.faults["triton"] = "no_memory"
    name, said = taken()
    assert name == "reference" and len(said) == 2  # until the process ends
    machine.faults.update(cuda="right")
    machine.restart()
    assert taken() == ("cuda", [])


@pytest.mark.parametrize("changed", ["_driver", "_device_name", "_digest"])
def test_a_verdict_of_another_machine_or_code_is_stale(machine, monkeypatch, changed):
    machine.faults["cuda"] = "raises"
    assert taken()[0] == "triton"
    machine.faults["cuda"] = "right"
    machine.restart()
    monkeypatch.setattr(_trust, changed, lambda *which: "another")
    assert taken()[0] == "cuda" and machine.asked == ["selective_scan:cuda"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"fault": null}', '{"a": {"selective_scan:cuda": 3}}', "\xff", None]
)
def test_a_damaged_file_counts_as_none(machine, content):
    file = _trust.verdict_file(_trust.identity("cuda", 0), "selective_scan:cuda")
    if content is None:  # the verdict is no text
        assert taken() == ("cuda", [])
        content = json.dumps(json.loads(file.read_text()) | {"fault": 3})
        machine.restart()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="latin-1")
    assert taken() == ("cuda", []) and machine.asked == ["selective_scan:cuda"]
    machine.restart()
    assert taken() == ("cuda", []) and machine.asked == []  # it was mended


def test_a_cache_that_cannot_be_written(machine, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    name, [message] = taken()
    assert name == "cuda" and f"cannot be kept ([Errno 20] Not a directory: '{tmp_path}/file/ssm_ops" in message
    assert "so every process checks again: set XDG_CACHE_HOME" in message
    assert taken() == ("cuda", [])


def test_a_user_without_a_home(machine, monkeypatch):
    """As in containers that run under any number."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(_trust.Path, "home", home)
    name, [message] = taken()
    assert name == "cuda" and "cannot be kept (Could not determine home directory.), so every process" in message


def test_policies(machine, monkeypatch):
    machine.faults["cuda"] = "raises"
    monkeypatch.setenv(_trust.VARIABLE, "0")
    assert taken() == ("cuda", []) and machine.asked == []
    monkeypatch.setenv(_trust.VARIABLE, "always")
    for _ in range(2):
        machine.restart()
        assert taken()[0] == "triton" and machine.asked == ["selective_scan:cuda", "selective_scan:triton"]
    monkeypatch.setenv(_trust.VARIABLE, "yes")
    _trust._problem.cache_clear()
    with pytest.raises(ValueError, match="^SSM_OPS_SELF_CHECK='yes' is not one of 0, 1, always$"):
        taken()


def test_a_library_without_code_for_the_device_is_not_asked(machine, monkeypatch):
    """Whatever the policy, and before any check."""
    reason = "the cuda library has nothing to run on this NVIDIA H100 (no kernel image); build it here: ..."
    monkeypatch.setattr(_trust, "probe", lambda index: reason)
    assert taken() == ("triton", [f"ssm_ops: selective_scan does not use cuda on cuda:0: {reason}"])
    assert machine.asked == ["selective_scan:triton"]
    monkeypatch.setenv(_trust.VARIABLE, "0")
    _trust._problem.cache_clear()
    assert taken()[0] == "triton"
    with pytest.raises(RuntimeError, match="impl='cuda' is not available on cuda:0: the cuda library has nothing to"):
        taken("cuda")


CUDA_BUILT = pytest.mark.skipif(_native.PROBLEMS["cuda"] is not None, reason=str(_native.PROBLEMS["cuda"]))


@CUDA_BUILT
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_the_library_says_what_the_driver_says(monkeypatch):
    monkeypatch.setattr(_trust, "_device_name", lambda index: "NVIDIA H100")
    found = _trust.probe(0)
    assert found.startswith("the cuda library has nothing to run on this NVIDIA H100 (ssm_ops_probe: ")
    assert re.search("driver|no CUDA-capable device", found) and "SSM_OPS_BUILD=cuda pip install" in found


def test_a_preference_is_checked_too(machine, monkeypatch):
    monkeypatch.setattr(_library, "DEFAULT_IMPL", "triton")
    assert taken() == ("triton", []) and machine.asked == ["selective_scan:triton"]
    machine.faults["triton"] = "raises"
    machine.restart()
    _trust.verdict_file(_trust.identity("triton", 0), "selective_scan:triton").unlink()
    name, [message] = taken()
    assert name == "cuda" and "does not use triton on cuda:0" in message


def test_a_compiler_asks_while_it_traces(machine):
    """The choice is a constant of the graph, and the check no part of it."""
    machine.faults["cuda"] = "raises"

    def name_of(x):
        return x + {"triton": 1, "cuda": 2, "reference": 3}[_library.resolve(SCAN, "auto", CUDA, torch.float32)]

    compiled = torch.compile(name_of, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 1 and machine.asked == ["selective_scan:cuda", "selective_scan:triton"]


# ---- the process that checks ----------------------------------------------------------------------------------------

ENDINGS = {
    "wrong": (
        "result[0][..., 70] *= 1.5",
        r"wrong numbers: out of torch.float32 at \(2, 12, 77\) is off by 0\.0",
        False,
    ),
    "wrong_gradient": ("", r"wrong numbers: dB of torch.float32 at \(2, 12, 77\) is off by 0\.01 of its size", False),
    "nan": ("result[0][0, 0, 0] = float('nan')", "wrong numbers: out of torch.float32 .* is off by nan", False),
    "other_bits": ("result[0].mul_(1 + 1e-6 * random.random())", "the same call gives other bits: out of", False),
    "inference": ("result[0].mul_(1.5 - 0.5 * args[-1])", "inference gives other bits than training: out of", False),
    "raises": ("raise RuntimeError('no kernel image is available for execution on the device')", NO_CODE, False),
    "hangs": ("time.sleep(1000)", "it hangs: no result within 20 s", False),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "it ended its process by SIGSEGV", False),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "it ended its process by SIGKILL", True),
    "exits": ("sys.exit('no driver')", "its process ended with exit status 1: no driver", False),
    "no_memory": ("raise torch.OutOfMemoryError('CUDA out of memory')", "OutOfMemoryError: CUDA out of memory", True),
    "held": ("raise RuntimeError('CUDA-capable device(s) is/are busy or unavailable')", "RuntimeError: CUDA-cap", True),
}


@BUILT
@pytest.mark.parametrize("fault", [n if n == "wrong" else pytest.param(n, marks=pytest.mark.full) for n in ENDINGS])
def test_what_a_kernel_does_to_its_process(monkeypatch, fault):
    """It is found, and this process goes on."""
    spoils, reason, passing = ENDINGS[fault]
    code = CHILD.format(fault=spoils or "pass", gradient=fault == "wrong_gradient")
    monkeypatch.setattr(_trust, "_command", lambda: [sys.executable, "-c", code])
    found, may_pass = _trust.ask("cuda:0", "selective_scan:cuda", 20 if fault == "hangs" else _trust.SECONDS)
    assert re.match(reason, found) and may_pass == passing, found


@pytest.mark.parametrize("executable", ["/no/python", "", None])
def test_a_python_that_is_not_there(monkeypatch, executable):
    """In a program that embeds Python there may be none."""
    monkeypatch.setattr(sys, "executable", executable)
    found, may_pass = _trust.ask("cpu", "selective_scan:cpu")
    assert found.startswith("no process can be started to check it: ") and may_pass


def test_what_other_libraries_print_is_no_verdict(monkeypatch):
    lines = ["hello", _trust.VERDICT + '{"fault": "wrong", "passing": false}', "bye"]
    monkeypatch.setattr(_trust, "_command", lambda: [sys.executable, "-c", f"print({chr(10).join(lines)!r})"])
    assert _trust.ask("cpu", "selective_scan:cpu") == ("wrong", False)
    monkeypatch.setattr(_trust, "_command", lambda: [sys.executable, "-c", "print('hello')"])
    assert _trust.ask("cpu", "selective_scan:cpu") == ("its process ended with exit status 0: no message", False)


def test_no_gpu_no_check(monkeypatch):
    """Shapes on a CUDA device that is not there (fake tensors) need no verdict."""
    monkeypatch.setattr(_trust, "ask", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _trust._problem.cache_clear()
    assert _trust.problem("selective_scan", "triton", 0) is None
    assert _library.distrust(SCAN, "cpu", torch.device("cpu")) is None


def test_every_operator_has_problems_of_all_that_its_kernels_compute():
    assert set(_self_check.PROBLEMS) == set(OPERATORS)
    for name, operator in OPERATORS.items():
        for impl in ("reference", "cpu"):
            if why_unavailable(operator, impl, "cpu") is None:
                assert _self_check.fault(name, impl, "cpu") is None


@pytest.mark.full
def test_triton_kernels_pass_under_the_interpreter():
    """The same problems, forward and backward: `triton_self_check_cases.py`."""
    assert passed_under_the_interpreter(["triton_self_check_cases.py"], "self_check") == 7


# ---- the doctor -----------------------------------------------------------------------------------------------------


def test_the_doctor_checks(machine, monkeypatch, capsys):
    """It asks anew, remembers, and its exit status tells."""
    monkeypatch.setattr(_library, "OPERATORS", {"selective_scan": SCAN})
    monkeypatch.setattr(doctor, "OPERATORS", {"selective_scan": SCAN})
    monkeypatch.setattr(doctor, "devices", lambda: [(CUDA, "cuda:0: NVIDIA H100, sm_90")])
    machine.faults["triton"] = "raises"
    assert doctor.main(["--check"]) == 1
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in table[:2]] == [["cuda:0", "selective_scan", i] for i in ("cuda", "triton")]
    assert table[0].endswith(" right") and "no kernel image is available" in table[1]
    assert table[2] == "1 of 2 are wrong: auto does not use those on a GPU"
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    assert "  selective_scan: auto takes cuda\n" in report and "    cuda       available, checked\n" in report
    assert "    triton     refused by its self-check: RuntimeError: no kernel image is available" in report
    machine.faults["triton"] = "right"
    assert doctor.main(["--check", "--device", "cuda:0"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "all 2 are right"
    assert taken("triton") == ("triton", []) and len(machine.asked) == 4


def test_the_doctor_names_devices_that_are_not_there(capsys):
    assert doctor.main(["--check", "--device", "cuda:99"]) == 2
    assert capsys.readouterr().err.startswith("--device cuda:99 is not here; there is cpu")
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--device", "cpu"])
    assert ended.value.code == 2


@BUILT
@pytest.mark.full
def test_the_command():
    """As a user runs it, on a CPU."""
    command = [sys.executable, "-m", "ssm_ops", "--check", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == f"all {len(lines) - 1} are right", done.stdout + done.stderr
    assert {line.split()[1] for line in lines[:-1]} == {n for n, o in OPERATORS.items() if o.find("cpu")}
