"""Files of `torch.save` are data: what official files hold is read, anything else is refused, and nothing ever runs."""

import argparse
import importlib
import io
import os
import pickle
import random
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

from ssm_models import CheckpointError, read_checkpoint
from ssm_models.unpickle import Name, Record, read_pickle

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.steps": torch.tensor(3)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pth"


def assert_weights(got):
    assert list(got) == list(WEIGHTS) and all(torch.equal(got[name], value) for name, value in WEIGHTS.items())


# ---- what official files hold ----


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_training_checkpoint_of_vmamba_and_vssd(path, zipped, monkeypatch):
    config = CfgNode(
        {"MODEL": {"NAME": "vssm1_tiny", "VSSM": {"DEPTHS": [2, 2, 8, 2], "SSM_RATIO": 1.0}}, "BASE": [""]}
    )
    config.freeze()
    state = {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}
    content = {"model": WEIGHTS, "optimizer": state, "config": config, "max_accuracy": np.float64(82.5), "epoch": 264}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for module in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it would fail
    got = read_pickle(path)
    assert got["config"]["MODEL"] == {"NAME": "vssm1_tiny", "VSSM": {"DEPTHS": [2, 2, 8, 2], "SSM_RATIO": 1.0}}
    assert np.frombuffer(got["max_accuracy"].args[1]) == 82.5 and got["epoch"] == 264
    assert got["optimizer"]["param_groups"] == state["param_groups"]
    assert_weights(read_checkpoint(path))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_training_checkpoint_of_vim(path, zipped):
    args = argparse.Namespace(lr=5e-4, model="vim_tiny", decay_epochs=None, betas=[0.9, 0.999])
    torch.save({"model": {}, "model_ema": WEIGHTS, "args": args}, path, _use_new_zipfile_serialization=zipped)
    assert read_pickle(path)["args"].state == vars(args)
    assert_weights(read_checkpoint(path, "ema"))


class HistoryBuffer:
    """What mmengine's class of this name looks like to pickle: arrays, and functions of a class."""

    def __init__(self, values):
        self.history = np.array(values)

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

    def mean(self):
        return self.history.mean()


def test_a_detector_of_mmengine(path, monkeypatch):
    name = "mmengine.logging.history_buffer"
    for module in ("mmengine", "mmengine.logging", name):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    sys.modules[name].HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", name)
    monkeypatch.setattr(HistoryBuffer.mean, "__module__", name)
    scalars = {"loss": HistoryBuffer([0.5, 0.25]), "empty": HistoryBuffer([])}
    state = {f"backbone.{name}": value for name, value in WEIGHTS.items()} | {"neck.w": torch.ones(1)}
    hub = {"log_scalars": scalars, "runtime_info": {"coco/bbox_mAP": np.float32(0.47)}}
    torch.save({"meta": {"epoch": 12}, "state_dict": state, "message_hub": hub}, path)
    monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    got = read_pickle(path)["message_hub"]["log_scalars"]["loss"].state
    assert got["history"].state[4] == np.array([0.5, 0.25]).tobytes()
    function = got["statistics_methods"]["mean"]
    assert type(function) is Record and function.args == (Name(f"{name}.HistoryBuffer"), "mean")
    assert_weights(read_checkpoint(path))


def test_allowed_globals_of_the_process_neither_count_nor_change(path):
    """Not by loads that succeed, nor by those that fail, nor while several threads load."""
    good = {"model": WEIGHTS, "config": CfgNode({"A": 1})}
    torch.save(good, path)
    torch.save({**good, "extra": Path("x")}, bad := path.with_name("bad.pth"))
    mine, seen = [CfgNode, type(Path("x"))], []
    with torch.serialization.safe_globals(mine):
        before = torch.serialization.get_safe_globals()

        def load(number: int) -> None:
            for _ in range(5):
                seen.append(torch.serialization.get_safe_globals() == before)
                if number % 2:
                    assert type(read_pickle(path)["config"]).__name__ == "OrderedDict"
                else:
                    with pytest.raises(CheckpointError, match="PosixPath"):
                        read_pickle(bad)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(load, range(8)))
        assert len(seen) == 40 and all(seen)
        assert torch.serialization.get_safe_globals() == before and set(mine) <= set(before)
    assert type(read_pickle(path)["config"]).__name__ == "OrderedDict"


# ---- what is refused ----


class Call:
    """Pickles as a call of `function`, which is made when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


TOUCH = "open({!r}, 'w').close()"


def import_on_load(trap: Path) -> object:
    """An instance of a class of a module that makes the trap when it is imported."""
    (trap.parent / "payload_module.py").write_text(f"{TOUCH.format(str(trap))}\nclass Thing: pass\n")
    importlib.invalidate_caches()
    thing = importlib.import_module("payload_module").Thing()
    trap.unlink()
    return thing


PAYLOADS = {
    "os.system": (lambda trap: Call(os.system, f"touch {trap}"), r"(posix|nt)\.system"),
    "eval": (lambda trap: Call(eval, TOUCH.format(str(trap))), "eval"),
    "exec": (lambda trap: Call(exec, TOUCH.format(str(trap))), "exec"),
    "open": (lambda trap: Call(open, str(trap), "w"), r"(_?io\.)?open"),
    "import": (import_on_load, r"payload_module\.Thing"),
    "nested": (lambda trap: Call(argparse.Namespace, Call(os.system, f"touch {trap}")), r"(posix|nt)\.system"),
}


def with_attribute(node, payload):
    node.__dict__["__setstate__"] = payload
    return node


PLACES = {
    "weights": lambda payload: {"model": {**WEIGHTS, "x": payload}},
    "beside": lambda payload: {"model": WEIGHTS, "epoch": [(payload,)]},
    "config": lambda payload: {"model": WEIGHTS, "config": dict.__ior__(CfgNode(), {"A": {"B": payload}})},
    "state of the config": lambda payload: {"model": WEIGHTS, "config": with_attribute(CfgNode(), payload)},
    "args": lambda payload: {"model": WEIGHTS, "args": argparse.Namespace(lr=payload)},
    "state of the args": lambda payload: {"model": WEIGHTS, "args": argparse.Namespace(__setstate__=payload)},
    "everything": lambda payload: payload,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", PAYLOADS)
def test_code_is_refused_by_name_and_does_not_run(kind, place, zipped, path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    trap = path.parent / "executed"
    make, name = PAYLOADS[kind]
    payload = make(trap)
    torch.save(PLACES[place](payload), path, _use_new_zipfile_serialization=zipped)
    copy = pickle.dumps(payload)
    sys.modules.pop("payload_module", None)
    with pytest.raises(
        CheckpointError, match=rf"file\.pth holds .*: (builtins\.)?{name}, and no code is run"
    ) as caught:
        read_checkpoint(path)
    assert not trap.exists() and "payload_module" not in sys.modules and "\n" not in str(caught.value)
    try:
        opened = pickle.loads(copy)
    except TypeError:  # "nested" gives the result of its call to a class that takes none
        opened = None
    if isinstance(opened, io.IOBase):
        opened.close()
    sys.modules.pop("payload_module", None)
    assert trap.exists(), "the payload is real"


def test_stand_ins_do_not_act(path):
    """The names that are allowed stand for nothing: `getattr` fetches nothing, and what it made cannot be called."""
    torch.save({"model": WEIGHTS, "x": Call(getattr, "text", "upper")}, path)
    assert read_pickle(path)["x"].args == ("text", "upper")
    call = b"\x80\x02c__builtin__\ngetattr\nX\x01\x00\x00\x00aX\x05\x00\x00\x00upper\x86R)R."
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(legacy + call)
    with pytest.raises(CheckpointError, match="a call of a Record, which is no function"):
        read_pickle(path)
    assert pickle.loads(call) == "A"


def test_a_namespace_among_the_weights_is_no_weight(path):
    torch.save({"model": {**WEIGHTS, "b": argparse.Namespace(x=1)}}, path)
    with pytest.raises(CheckpointError, match="has among its weights 'b'"):
        read_checkpoint(path)


def test_damaged_bytes_are_an_error_of_ours_or_harmless(path):
    torch.save({"model": WEIGHTS, "config": CfgNode({"A": 1})}, path, _use_new_zipfile_serialization=False)
    data, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(damaged[: draw.randint(len(data) // 2, len(data))] if draw.random() < 0.2 else damaged)
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            assert "file.pth" in str(error) and "\n" not in str(error)
            refused += 1
    assert 100 < refused < 300
