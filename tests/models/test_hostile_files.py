"""Damaged and malicious files: a right answer or a CheckpointError of one short line, in bounded time and memory.

The random ones are as many as tests/hostile/amount.py says.
"""

import argparse
import io
import pickle
import random
import resource
import signal
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_safetensors
from yacs.config import CfgNode

from ssm_models import CheckpointError, read_checkpoint
from ssm_models.unpickle import read_pickle

from ..hostile.amount import amounts

SECONDS = 60  # a guard against what never ends
MEBIBYTES = 512  # beside the file itself

WEIGHTS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.tensor([1.0, -2.0], dtype=torch.float64),
    "b": torch.arange(12, dtype=torch.int16).view(3, 4).t(),
    "c": torch.tensor(3),
    "d": torch.ones(5, dtype=torch.bfloat16),
}


def of_torch(content: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def training(zipped: bool) -> bytes:
    args = argparse.Namespace(lr=1e-3, betas=(0.9, 0.999), names=["x", "y"])
    config = CfgNode({"MODEL": {"NAME": "x", "DEPTHS": [2, 2]}, "BASE": [""]})
    state = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return of_torch({"model": WEIGHTS, "optimizer": state, "args": args, "config": config, "epoch": 7}, zipped)


BASES = {
    "zip.pth": of_torch(WEIGHTS),
    "training.pth": training(zipped=True),
    "legacy.pth": of_torch(WEIGHTS, zipped=False),
    "old-training.pth": training(zipped=False),
    "weights.safetensors": save_safetensors({name: value.contiguous() for name, value in WEIGHTS.items()}),
}


class TookTooLong(Exception):
    pass


@pytest.fixture(autouse=True)
def bounded():
    """Fails what hangs, and what takes memory beyond the size of its file."""

    def alarm(*_):
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, alarm)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEBIBYTES << 10


def answer(path: Path, content: bytes) -> dict[str, torch.Tensor] | str:
    """The weights in a file of that content, or the reason against it; everything else is a failure."""
    path.write_bytes(content)
    signal.alarm(SECONDS)
    try:
        weights = read_checkpoint(path)
    except CheckpointError as error:
        reason = str(error)
        assert reason.isprintable() and len(reason) <= 300 and path.name in reason, reason
        assert "weights_only" not in reason and "trust" not in reason
        return reason
    finally:
        signal.alarm(0)
    for name, value in weights.items():
        assert isinstance(name, str) and isinstance(value, torch.Tensor)
        value.sum()  # every element lies in memory that is there
    assert sum(value.numel() * value.element_size() for value in weights.values()) <= 10 * len(content)
    return weights


# ---- at random ----


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to three of: flipped bits, changed bytes, cut ends, ranges that are doubled, removed, moved or set."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        data = bytearray(data)
        at, to = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        if draw.random() < 0.7:
            to = min(to, at + draw.choice([1, 2, 4, 8, 40]))
        kind = draw.choice([0, 0, 0, 0, 1, 2, 3, 4, 5, 6])
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at:to] = draw.randbytes(to - at)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at:to]
        elif kind == 4:
            data[at:at] = data[at:to]
        elif kind == 5:
            data[at:to] = draw.choice([b"\0", b"\xff", b"\x7f", b"]", b"}", b"("]) * (to - at)
        else:
            absurd = struct.pack("<Q", draw.choice([2**63 - 1, 2**64 - 1, 2**62, 2**40, 2**31 - 1, 2**32 - 1]))
            data[at : at + draw.choice([4, 8])] = absurd
    return bytes(data)


def repacked(data: bytes, draw: random.Random) -> bytes:
    """A zip file whose pickle is mutated and whose checksums are right; entries may go, or be there twice."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            entry = old.read(name)
            if name.endswith("data.pkl"):
                entry = mutate(entry, draw)
            elif draw.random() < 0.02:
                continue
            new.writestr(name, entry)
    return packed.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("files", amounts(300, 5000))
def test_random_damage(tmp_path, files):
    draw = random.Random(files)
    outcomes = {True: 0, False: 0}
    for number in range(files):
        name = draw.choice(list(BASES))
        zipped = BASES[name].startswith(b"PK")
        inside = zipped and draw.random() < 0.6
        content = (repacked if inside else mutate)(BASES[name], draw)
        got = answer(tmp_path / name, content)
        outcomes[isinstance(got, dict)] += 1
        if zipped and not inside and isinstance(got, dict):
            # checksums: what is read of a zip file is what was saved
            assert got.keys() == WEIGHTS.keys(), number
            assert all(torch.equal(value, WEIGHTS[key]) for key, value in got.items()), number
    assert outcomes[False] > files // 2 and outcomes[True] > files // 30


# ---- on purpose ----


def packed(pickled: bytes, storages: dict[str, bytes] | None = None, compress: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of torch.save with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compress) as archive:
        archive.writestr("x/data.pkl", pickled)
        for key, content in (storages or {"0": bytes(24)}).items():
            archive.writestr(f"x/data/{key}", content)
    return file.getvalue()


def legacy(pickled: bytes, keys: list, storages: bytes = b"") -> bytes:
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + pickled + pickle.dumps(keys, 2) + storages


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    body = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + body


def tensor(
    count: int, offset: int, size: tuple, stride: tuple, kind: str = "torch FloatStorage", key: str = "0"
) -> bytes:
    """Instructions that make a tensor of storage `key`."""

    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    storage = b"(" + text("storage") + b"c" + kind.replace(" ", "\n").encode() + b"\n" + text(key) + text("cpu")
    storage += integer(count) + b"tQ"
    arguments = storage + integer(offset) + numbers(size) + numbers(stride) + b"\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def weights_of(value: bytes) -> bytes:
    """A pickle of {"w": value}."""
    return b"\x80\x02}" + text("w") + value + b"s."


def test_the_crafted_files_are_read_where_they_are_right(tmp_path):
    """So that those below are refused for what they say, not for how they were made."""
    right = weights_of(tensor(6, 1, (2, 2), (2, 1)))
    floats = torch.arange(6.0)
    stored = floats.numpy().tobytes()
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(answer(tmp_path / "a.pth", packed(right, {"0": stored}))["w"], expected)
    content = legacy(right, ["0"], struct.pack("<q", 6) + stored)
    assert torch.equal(answer(tmp_path / "a.pth", content)["w"], expected)


HUGE = [2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1]
TENSORS = {
    "a storage larger than its bytes": tensor(7, 0, (2,), (1,)),
    "a storage smaller than its bytes": tensor(5, 0, (2,), (1,)),
    "a huge storage": tensor(2**62, 0, (2,), (1,)),
    "a negative storage": tensor(-1, 0, (2,), (1,)),
    "a huge offset": tensor(6, 2**62, (2,), (1,)),
    "an offset too far": tensor(6, 5, (2,), (1,)),
    "a negative offset": tensor(6, -1, (2,), (1,)),
    "a huge size": tensor(6, 0, (2**62,), (1,)),
    "a product beyond 64 bits": tensor(6, 0, (2**33, 2**33, 0), (1, 1, 1)),
    "a huge stride": tensor(6, 0, (2,), (2**62,)),
    "strides that wrap around": tensor(6, 0, (5, 2), (2**62, 1)),
    "a negative stride": tensor(6, 5, (3,), (-1,)),
    "a stride of zero": tensor(6, 0, (2**40,), (0,)),
    "overlapping rows": tensor(6, 0, (1000, 1000), (0, 0)),
    "fewer strides than sizes": tensor(6, 0, (2, 2), (1,)),
    "65 dimensions": tensor(6, 0, (1,) * 65, (1,) * 65),
    "another element size": tensor(6, 0, (2,), (1,), "torch DoubleStorage"),
    "bytes without a type": tensor(24, 0, (2,), (1,), "torch.storage UntypedStorage"),
    "no such storage": tensor(6, 0, (2,), (1,), key="1"),
    "a storage outside of the folder": tensor(6, 0, (2,), (1,), key="../data.pkl"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_lie_in_their_storage(case, tmp_path):
    pickled = weights_of(TENSORS[case])
    assert "is damaged or no checkpoint: it" in answer(tmp_path / "a.pth", packed(pickled))
    if "outside" not in case:
        content = legacy(pickled, ["1" if "no such" in case else "0"], struct.pack("<q", 6) + bytes(24))
        if "no such" not in case:
            assert "is damaged or no checkpoint: it" in answer(tmp_path / "b.pth", content)


@pytest.mark.parametrize("keys", [[], ["1"], ["0", "0"], ["0", "1"], [0], "0", [["0"]]], ids=repr)
def test_storages_that_are_not_listed(keys, tmp_path):
    """Whose memory was never written: such weights would be whatever lay there."""
    content = legacy(weights_of(tensor(6, 0, (2,), (1,))), keys, struct.pack("<q", 6) + bytes(24))
    assert "its list of storages is not that of its tensors" in answer(tmp_path / "a.pth", content)


@pytest.mark.parametrize("count, held", [(5, 24), (7, 24), (-1, 24), (2**62, 24), (6, 23), (6, 0)])
def test_storages_of_another_length_than_they_say(count, held, tmp_path):
    content = legacy(weights_of(tensor(6, 0, (2,), (1,))), ["0"], struct.pack("<q", count) + bytes(held))
    assert "it has not the 24 bytes of storage 0" in answer(tmp_path / "a.pth", content)


def sized(opcode: bytes, form: str, size: int) -> bytes:
    return opcode + struct.pack(form, size & (2 ** (8 * struct.calcsize(form)) - 1))


LENGTHS = {
    "BINUNICODE8": (b"\x8d", "<Q"),
    "BINBYTES8": (b"\x8e", "<Q"),
    "BYTEARRAY8": (b"\x96", "<Q"),
    "BINUNICODE": (b"X", "<I"),
    "BINBYTES": (b"B", "<I"),
    "BINSTRING": (b"T", "<I"),
    "LONG4": (b"\x8b", "<I"),
    "FRAME": (b"\x95", "<Q"),
    "LONG_BINGET": (b"j", "<I"),
    "SHORT_BINUNICODE": (b"\x8c", "<B"),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_beyond_the_file(name, tmp_path):
    for size in HUGE:
        instruction = sized(*LENGTHS[name], size)
        for content in (packed(weights_of(instruction)), legacy(weights_of(instruction), [])):
            assert isinstance(answer(tmp_path / "a.pth", content), str)


def nested(opening: bytes, depth: int, closing: bytes = b"") -> bytes:
    return opening * depth + b"N" + closing * depth


def shared(level: bytes, times: int) -> bytes:
    """Each value holds the one before twice: 2 ** times in all."""
    return b"N" + b"".join(b"q\x00h\x00" + level for _ in range(times))


LONG = "x" * 100_000
BOMBS = {
    "nested tuples": b"N" + b"\x85" * 50_000,
    "nested lists": b"]" * 50_000 + b"a" * 49_999,
    "nested dictionaries": (b"}" + text("k")) * 20_000 + b"N" + b"s" * 20_000,
    "nested records": b"cargparse\nNamespace\nq\x00" + b"(h\x00" * 50_000 + b"N" + b"\x85R" * 3,
    "marks": b"(" * 50_000,
    "shared tuples": shared(b"\x86", 90),
    "a shared long text": text(LONG) + b"q\x01(" + b"h\x01" * 100_000 + b"t",
    "a list that holds itself": b"]q\x00h\x00a",
    "a dictionary that holds itself": b"}q\x00" + text("k") + b"h\x00s",
    "a tuple as key": b"}(" + shared(b"\x86", 60) + b"Nu",
    "a list as key": b"}]Ns",
    "keys of one hash": b"}(" + b"".join(integer(7 + k * (2**61 - 1)) + b"N" for k in range(1, 10_000)) + b"u",
    "a million lists": b"(" + b"]" * 1_050_000 + b"t",
    "a million sets": b"(" + b"\x8f" * 1_050_000 + b"t",
    "bytes copied again and again": b"c_codecs\nencode\nq\x00" + text(LONG) + b"q\x01" + text("latin1") + b"q\x02("
    + b"h\x00h\x01h\x02\x86R" * 50_000 + b"t",
    "a list copied again and again": b"ccollections\nOrderedDict\nq\x00((" + (text("k") + b"N\x86") * 5000 + b"lq\x01"
    + b"h\x00h\x01\x85R" * 5000 + b"t",
    "a set copied again and again": b"c__builtin__\nset\nq\x00((" + b"K\x01" * 5000 + b"lq\x01"
    + b"h\x00h\x01\x85R" * 5000 + b"t",
    "a huge number": b"\x8b" + struct.pack("<I", 1_000_000) + b"\x7f" * 1_000_000,
    "a number of many digits": b"I" + b"9" * 60_000 + b"\n",
    "an endless line": b"c" + b"x" * 10_000_000,
    "an index of the memo": b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff\x85",
    "a call of a value": b"]q\x00)R",
    "a call without arguments": b"ctorch._utils\n_rebuild_tensor_v2\nNR",
    "a tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR",
    "a state for a tensor": tensor(6, 0, (2,), (1,)) + b"}b",
    "a state for a list": b"]}b",
    "a storage that is none": b"(" + text("storage") + b"NNNNtQ",
    "a module": b"(" + text("module") + b"NNNtQ",
    "an extension": b"\x82\x01",
    "an instance": b"(ios\nsystem\n",
    "a name without text": b"NN\x93",
    "nothing left": b"000000",
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(case, tmp_path):
    pickled = weights_of(BOMBS[case])
    limit = sys.getrecursionlimit()
    path = tmp_path / "a.pth"
    assert isinstance(answer(path, packed(pickled)), str)
    if len(pickled) < 1 << 17:
        assert isinstance(answer(path, legacy(pickled, [])), str)
        # whether or not it is among the weights
        path.write_bytes(packed(pickled.replace(b"\x80\x02}", b"\x80\x02}" + text("model") + b"}s", 1)))
        signal.alarm(SECONDS)
        with pytest.raises(CheckpointError):
            read_pickle(path)
    assert sys.getrecursionlimit() == limit


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


ZIP = packed(weights_of(tensor(6, 0, (2,), (1,))))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives(tmp_path):
    path = tmp_path / "a.pth"
    twice = io.BytesIO(ZIP)
    with zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("x/data/0", bytes(24))
    assert "entries twice" in answer(path, twice.getvalue())
    bomb = packed(weights_of(b"N"), {"0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 17 and "the compressed entry x/" in answer(path, bomb)
    assert "has no data.pkl" in answer(path, replaced(ZIP, b"data.pkl", b"code.pkl"))
    assert "its zip archive is broken" in answer(path, ZIP[:-30])
    assert "its zip archive is broken: Bad CRC-32" in answer(path, replaced(ZIP, bytes(24), b"\1" + bytes(23)))
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as archive:
        for number in range(70_000):
            archive.writestr(f"x/{number}", b"")
    assert "or too many" in answer(path, many.getvalue())
    other_order = packed(weights_of(tensor(6, 0, (2,), (1,))))
    program = io.BytesIO(other_order)
    with zipfile.ZipFile(program, "a") as archive:
        archive.writestr("x/constants.pkl", b"N.")
    assert "a TorchScript program" in answer(path, program.getvalue())
    big = io.BytesIO(other_order)
    with zipfile.ZipFile(big, "a") as archive:
        archive.writestr("x/byteorder", b"big")
    assert "byte order" in answer(path, big.getvalue())


FOREIGN = {
    "an empty file": b"",
    "nothing but zeros": bytes(5000),
    "a web page": b"\n<!DOCTYPE html><html>no such file</html>",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n",
    "compressed with gzip": b"\x1f\x8b\x08\x00" + bytes(100),
    "a tar archive": bytes(100).ljust(257, b"x") + b"ustar\x0000" + bytes(1000),
    "a text file": b'{"error": "not found"}',
    "a NumPy array": b"\x93NUMPY\x01\x00" + bytes(100),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_kinds_are_named(kind, suffix, tmp_path):
    assert kind in answer(tmp_path / f"a{suffix}", FOREIGN[kind])


def test_endings_that_do_not_fit(tmp_path):
    assert "give it the ending .safetensors" in answer(tmp_path / "a.pth", BASES["weights.safetensors"])
    assert "give it the ending .pth" in answer(tmp_path / "a.safetensors", BASES["zip.pth"])
    assert "give it the ending .pth" in answer(tmp_path / "a.safetensors", BASES["legacy.pth"])
    scripted = tmp_path / "scripted.pth"
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(scripted))
    assert "a TorchScript program" in answer(scripted, scripted.read_bytes())


def test_names_of_any_length_make_one_short_line(tmp_path):
    odd = "\x1b[31m\n\u202e" + "y" * 10_000
    for content in ({odd: 3}, {odd: torch.ones(1), "x": 3}, {"model": {odd: 3}}, {f"{odd}{n}": n for n in range(9)}):
        assert isinstance(answer(tmp_path / "a.pth", of_torch(content)), str)
