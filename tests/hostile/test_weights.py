"""Hostile files of weights in a process of its own, in little memory and time, and through the command.

What each of them is answered stands in tests/models/test_hostile_files.py.
"""

import os
import pickle
import struct
import sys
import threading
from pathlib import Path

import pytest
import torch

from ssm_models import CheckpointError, read_checkpoint

from ..classification.conftest import MAIN
from ..models.test_hostile_files import BOMBS, FOREIGN, TENSORS, legacy, of_torch, packed, text, weights_of
from .child import run_limited


class Touch:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def safetensors(header: bytes, length: int | None = None, data: bytes = bytes(24)) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def one(dtype: str, shape: str, offsets: str, name: str = "a") -> bytes:
    return safetensors(f'{{"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'.encode())


SAFETENSORS = {
    "a header beyond the file": safetensors(b"{}", 1 << 40),
    "a header of all bits": safetensors(b"{}", (1 << 64) - 1),
    "offsets beyond the file": one("F32", "[6]", "[0,9000000000]"),
    "offsets the wrong way": one("F32", "[6]", "[24,0]"),
    "a huge shape": one("F32", "[9223372036854775807,9]", "[0,24]"),
    "a negative shape": one("F32", "[-6]", "[0,24]"),
    "another length": one("F32", "[5]", "[0,24]"),
    "an unknown kind": one("F128", "[6]", "[0,24]"),
    "deep nesting": safetensors(b'{"a":' + b"[" * 60_000 + b"]" * 60_000 + b"}"),
    "no JSON": safetensors(b"{nonsense"),
    "many names": safetensors(b"{" + b",".join(b'"%d":{"dtype":"F32"}' % n for n in range(40_000)) + b"}"),
}


def write_all(folder: Path, canary: Path) -> int:
    """Every hostile file that there is; none of them may be read. Returns their number."""
    contents = [packed(weights_of(value)) for value in (*BOMBS.values(), *TENSORS.values())]
    contents += [legacy(weights_of(value), []) for value in BOMBS.values()]
    contents += [packed(weights_of(f"cposix\nmkdir\n({text(str(canary)).decode('latin-1')}tR".encode("latin-1")))]
    contents += [of_torch({"model": {"a": torch.ones(1)}, "extra": Touch(canary)}, zipped) for zipped in (True, False)]
    contents += [of_torch({f"{n}": n for n in range(20_000)})]
    for number, content in enumerate(contents):
        (folder / f"{number:03d}.pth").write_bytes(content)
    for number, content in enumerate((*SAFETENSORS.values(), *FOREIGN.values())):
        (folder / f"{number:03d}.safetensors").write_bytes(content)
    os.mkfifo(folder / "pipe.pth")
    (folder / "zero.pth").symlink_to("/dev/zero")
    (folder / "folder.safetensors").mkdir()
    return len(list(folder.iterdir()))


CHILD = """
import sys
from pathlib import Path
from ssm_models import CheckpointError, read_checkpoint
count = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        message = str(error)
        assert message.isprintable() and len(message) <= 300, message
        count += 1
    else:
        print("read:", path.name)
print(count)
"""


def test_all_of_them_in_a_limited_process(tmp_path):
    (tmp_path / "files").mkdir()
    count = write_all(tmp_path / "files", tmp_path / "canary")
    assert count > 100
    done = run_limited([sys.executable, "-c", CHILD, str(tmp_path / "files")], memory_gb=6, seconds=200)
    assert (done.returncode, done.stdout) == (0, f"{count}\n"), done.stderr[-2000:]
    assert not (tmp_path / "canary").exists()
    # it would have sung
    pickle.loads(pickle.dumps(Touch(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["the canary", "bytes copied again and again", "a header beyond the file", "a pipe"])
def test_the_command(kind, tiny_cfg, tmp_path):
    path = tmp_path / ("a.safetensors" if kind in SAFETENSORS else "a.pth")
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "the canary":
        path.write_bytes(of_torch({"model": {"a": torch.ones(1)}, "extra": Touch(tmp_path / "canary")}))
    else:
        path.write_bytes(SAFETENSORS[kind] if kind in SAFETENSORS else packed(weights_of(BOMBS[kind])))
    command = [
        sys.executable,
        str(MAIN),
        "--cfg",
        str(tiny_cfg),
        "--pretrained",
        str(path),
        "--output",
        str(tmp_path / "r"),
    ]
    done = run_limited(command, memory_gb=8, seconds=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "canary").exists() and not (tmp_path / "r").exists()


def test_other_threads_load_as_before(tmp_path):
    """Reading here changes nothing for `torch.load` elsewhere: what it permits and what it refuses."""
    torch.save({"a": torch.arange(3.0)}, tmp_path / "a.pth")
    (tmp_path / "bad.pth").write_bytes(of_torch({"extra": Touch(tmp_path / "canary")}))
    stop, wrong = threading.Event(), []

    def load() -> None:
        while not stop.is_set():
            if not torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)["a"], torch.arange(3.0)):
                wrong.append("other values")
            try:
                torch.load(tmp_path / "bad.pth", weights_only=True)
                wrong.append("no refusal")
            except pickle.UnpicklingError as error:
                if "mkdir" not in str(error):
                    wrong.append(str(error))

    thread = threading.Thread(target=load)
    thread.start()
    for _ in range(100):
        assert torch.equal(read_checkpoint(tmp_path / "a.pth")["a"], torch.arange(3.0))
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "bad.pth")
    stop.set()
    thread.join()
    assert wrong == [] and not (tmp_path / "canary").exists()
