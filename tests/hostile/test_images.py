"""Images and folders of images that fill the memory, never end, or lead around in circles."""

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analyze import predict
from ssm_train.common.decode import LARGEST_RATIO, UNREADABLE, Decoder
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config
from ssm_train.data.build import scan_split
from ssm_train.data.dataset import _MOST_TRIES, BadImages, TrainImages
from ssm_train.data.samplers import Key
from ssm_train.data.sources.base import read_range
from ssm_train.data.transforms import eval_transform

from ..classification.conftest import MAIN
from .child import run_limited


def png(width: int, height: int, rows: bytes | None = None) -> bytes:
    """A grey PNG of this size in its header; black, if `rows` does not say otherwise."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = zlib.compress(bytes((width + 1) * height) if rows is None else rows)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


SHAPES = {
    "1 x 20000": png(1, 20_000),
    "20000 x 1": png(20_000, 1),
    "just too long": png(LARGEST_RATIO + 1, 1),
    "a bomb": png(100_000, 100_000, b""),
    "a bomb below Pillow's error": png(12_000, 12_000, b""),
    "the largest header": png(2**31 - 1, 2**31 - 1, b""),
    "a long bitmap": b"BM" + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, 1, 2_000_000, 1, 24) + bytes(24),
    "a gif of 65535 x 1": b"GIF89a" + struct.pack("<HHBBB", 65535, 1, 0, 0, 0) + b";",
}


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_are_refused_by_their_headers(kind):
    with pytest.raises(UNREADABLE):
        Decoder()(SHAPES[kind])


def test_the_longest_image_that_is_read_is_bounded_at_the_largest_size(tiny_cfg):
    image = Decoder()(png(LARGEST_RATIO, 1))
    assert eval_transform(load_config(str(tiny_cfg), ["DATA.IMG_SIZE", "224"]))(image).shape == (3, 224, 224)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


FILES = {
    "pipe": (pipe, "not a regular file"),
    "terabyte": (sparse, "bytes are no image"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "loop": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "empty": (Path.touch, "no image|not an image|known format"),
    "folder": (Path.mkdir, "not a regular file|directory"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_image_file(tmp_path, kind):
    make, words = FILES[kind]
    make(tmp_path / "x.png")
    with pytest.raises(UNREADABLE, match=words):
        Decoder()(read_range(tmp_path / "x.png"))


def test_links_in_class_folders_are_followed_once(tiny_cfg, own_tree, tmp_path):
    """In circles, to the parent, to another class, twice to the same place; and a real folder elsewhere counts."""

    def names() -> list[str]:
        source = scan_split(load_config(str(tiny_cfg), flags={"data_path": str(own_tree)}), "train")
        return [source.name(index) for index in range(len(source))]

    before, cat = names(), own_tree / "train/cat"
    (cat / "again").symlink_to(cat)
    (cat / "up").symlink_to("..")
    (cat / "other").symlink_to(own_tree / "train/dog")
    (cat / "a/b").mkdir(parents=True)
    (cat / "a/b/around").symlink_to(cat / "a")
    (tmp_path / "more").mkdir()
    for name in ("z1", "z2"):
        (cat / name).symlink_to(tmp_path / "more")
    assert names() == before
    Image.new("RGB", (8, 8)).save(tmp_path / "more/one.png")
    (cat / "a/b/two.png").write_bytes((tmp_path / "more/one.png").read_bytes())
    added = set(names()) - set(before)
    assert added == {str(cat / "z1/one.png"), str(cat / "a/b/two.png")} and len(names()) == len(before) + 2


def test_special_files_among_the_images_are_named_and_replaced(cli, own_tree, tmp_path):
    os.mkfifo(own_tree / "train/cat/pipe.png")
    sparse(own_tree / "train/dog/huge.png")
    (own_tree / "train/eel/thin.png").write_bytes(png(1, 20_000))
    (own_tree / "val/eel/thin.png").write_bytes(png(1, 20_000))
    outcome = cli("--data-path", own_tree, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome
    for name, reason in (
        ("cat/pipe.png", "not a regular file"),
        ("dog/huge.png", "no image"),
        ("eel/thin.png", "50 to 1"),
    ):
        [line] = [line for line in outcome.out.splitlines() if f"train/{name}" in line]
        assert reason in line


class Unreadable:
    """A million images, none of which can be read."""

    def __init__(self, count: int = 1_000_000) -> None:
        self.count, self.reads = count, []
        self.targets, self.decoder = np.zeros(count, np.int64), Decoder()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{index}.png"

    def read(self, index: int) -> bytes:
        self.reads.append(index)
        raise OSError("gone")

    def decode(self, data: bytes) -> Image.Image:
        raise AssertionError("nothing was read")


def test_an_unreadable_data_set_is_given_up_after_few_tries(caplog, tiny_cfg):
    source = Unreadable()
    images = TrainImages(source, eval_transform(load_config(str(tiny_cfg))), seed=0, max_bad_share=0.5)
    sample = images[Key(0, 999_990)]
    assert sample.hopeless and len(source.reads) == len(set(source.reads)) == _MOST_TRIES
    # not only its neighbours
    assert max(source.reads) - min(source.reads) > 900_000
    bad = BadImages(World(0, 1, None), len(source), 0.5)
    bad.add(sample.bad, sample.hopeless)
    with pytest.raises(UserError, match="all that were tried in the place of one") as caught:
        bad.share()
    assert len(str(caught.value)) < 600
    assert sum("unreadable image" in record.getMessage() for record in caplog.records) == 50
    assert "the others are not named" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("count", [1, 2, 40, 64])
def test_the_one_readable_image_of_a_small_data_set_is_found(count, tiny_cfg):
    """All are tried where there are few."""

    class OneReadable(Unreadable):
        def read(self, index: int) -> bytes:
            return b"" if index == count // 2 else super().read(index)

        def decode(self, data: bytes) -> Image.Image:
            return Image.new("RGB", (8, 8), "white")

    images = TrainImages(OneReadable(count), eval_transform(load_config(str(tiny_cfg))), seed=0, max_bad_share=1)
    samples = [images[Key(0, index)] for index in range(count)]
    assert not any(sample.hopeless for sample in samples) and all((sample.image > 1).all() for sample in samples)


def test_predictions_of_a_folder_with_unreadable_files(own_tree, tmp_path, capsys):
    folder = own_tree / "val/cat"
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "thin.png").write_bytes(png(1, 20_000))
    arguments = ["--model", "vmamba_nano", "--device", "cpu", "--out", str(tmp_path / "p.png"), "--images"]
    assert predict.main([*arguments, str(folder)]) == 1
    told = capsys.readouterr()
    assert [line.split(" cannot")[0] for line in told.err.splitlines()] == [
        str(folder / "cut.png"),
        str(folder / "thin.png"),
    ]
    assert (tmp_path / "p.csv").read_text().count("/0.png,1,") == 1
    assert predict.main([*arguments, str(folder / "thin.png")]) == 2
    assert "error: none of the 1 images is readable" in capsys.readouterr().err
    assert predict.main([*arguments, str(folder / "0.png")]) == 0


@pytest.mark.full
def test_the_command_in_little_memory(own_tree, tiny_cfg, tmp_path):
    """Bombs of all shapes among the images of a real run of the command."""
    for number, content in enumerate(SHAPES.values()):
        (own_tree / f"val/cat/bomb{number}.png").write_bytes(content)
    os.mkfifo(own_tree / "val/cat/pipe.png")
    command = [
        sys.executable,
        str(MAIN),
        "--cfg",
        str(tiny_cfg),
        "--data-path",
        str(own_tree),
        "--output",
        str(tmp_path / "r"),
    ]
    done = run_limited([*command, "--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"], memory_gb=8, seconds=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("unreadable image, left out of the metrics") == len(SHAPES) + 1
