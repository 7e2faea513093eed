"""Archives that are damaged, in any format: the image is named and replaced, or the archive refused."""

import random
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from pyarrow import parquet

from ssm_train.common.decode import Decoder
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.data.build import scan_split, train_loader
from ssm_train.data.dataset import BadImage, TrainImages, load_image
from ssm_train.data.transforms import train_transform
from tests.classification.formats import (
    WRITERS,
    encoded,
    listing,
    table_of,
    write_parquet,
    write_tar,
    write_zip,
)

CPU = World(0, 1, torch.device("cpu"))


def corrupt_member(path: Path, data: bytes) -> None:
    """Overwrite the middle of the image `data` in the archive at `path`."""
    content = path.read_bytes()
    assert content.count(data) == 1
    start = content.index(data) + len(data) // 3
    path.write_bytes(content[:start] + b"\0" * 64 + content[start + 64 :])


def test_zip_checksum(config, image_tree, tmp_path):
    """One wrong pixel in an image that has no checksum of its own."""
    write_zip(image_tree, tmp_path)
    pixels = encoded(Image.effect_noise((9, 9), 50), "BMP")
    with zipfile.ZipFile(tmp_path / "train.zip", "a") as archive:
        archive.writestr("cat/new.bmp", pixels)
    with open(tmp_path / "train_map.txt", "a") as lines:
        lines.write("cat/new.bmp\t0\n")
    content = (tmp_path / "train.zip").read_bytes()
    source = scan_split(config("zip", tmp_path), "train")
    assert load_image(source, 21).size == (9, 9)
    wrong = pixels[:-1] + bytes([pixels[-1] ^ 1])
    (tmp_path / "train.zip").write_bytes(content.replace(pixels, wrong))
    assert load_image(source, 21).reason == "the zip archive is damaged here: length or checksum differ"


def test_archive_that_became_shorter(config, image_tree, tmp_path):
    write_tar(image_tree, tmp_path)
    path = tmp_path / "train.tar"
    source = scan_split(config("tar", tmp_path), "train")
    offset, size = source._where[3, 1:].tolist()
    path.write_bytes(path.read_bytes()[: offset + 10])
    assert load_image(source, 3) == BadImage(
        f"{path}@/cat/3.png", f"the file ends after {offset + 10} bytes, but the image goes on to {offset + size}"
    )


def test_damaged_row_group(config, image_tree, tmp_path):
    """All of its images are bad, none of the other groups'."""
    path = tmp_path / "train.parquet"
    images = listing(image_tree, "train")
    parquet.write_table(table_of(images), path, row_group_size=8)
    column = parquet.read_metadata(path).row_group(1).column(0)
    assert column.path_in_schema == "image.bytes"
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    source = scan_split(config("parquet", tmp_path), "train")
    loaded = [load_image(source, index) for index in range(21)]
    assert [index for index, image in enumerate(loaded) if isinstance(image, BadImage)] == list(range(8, 16))
    assert loaded[9].path == f"{path} row 9" and loaded[9].reason
    assert loaded[20].tobytes() == Decoder()(images[20][0].read_bytes()).tobytes()


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "parquet"])
def test_damaged_members_are_replaced_alike_with_and_without_workers(kind, config, own_tree, tmp_path):
    if kind == "parquet":
        write_parquet(own_tree, tmp_path, compression="none", write_statistics=False)
    elif kind != "folder":
        WRITERS[kind](own_tree, tmp_path)
    root = own_tree if kind == "folder" else tmp_path
    options = "DATA.BATCH_SIZE", 7, "AUG.HFLIP", 0.5, "DATA.MAX_BAD_SHARE", 0.2
    cfg = config(kind, root, *options)
    intact = next(iter(train_loader(cfg, scan_split(cfg, "train"), CPU)))
    for number in (5, 6):
        data = (own_tree / f"train/cat/{number}.png").read_bytes()
        paths = [path for path in sorted(root.rglob("*")) if path.is_file() and data in path.read_bytes()]
        archives = [path for path in paths if path.suffix in (".zip", ".tar", ".parquet")]
        (path,) = archives or paths
        corrupt_member(path, data)
    batches = []
    for workers in (0, 2):
        cfg = config(kind, root, *options, "DATA.NUM_WORKERS", workers)
        source = scan_split(cfg, "train")
        batches.append(list(train_loader(cfg, source, CPU)))
    bad = [entry for batch in batches[0] for entry in batch.bad]
    assert {entry.path for entry in bad} == {source.name(5), source.name(6)} and all(entry.reason for entry in bad)
    for one, two in zip(*batches, strict=True):
        assert torch.equal(one.images, two.images) and one.bad == two.bad and one.keys == two.keys
    # both positions show image 7 with its label, and every other position what it showed before
    dataset = TrainImages(source, train_transform(cfg), seed=0, max_bad_share=0.2)
    targets = {
        key.index: int(target) for batch in batches[0] for key, target in zip(batch.keys, batch.targets, strict=True)
    }
    assert targets == {index: 1 if index in (5, 6) else index // 7 for index in range(21)}
    assert dataset[batches[0][0].keys[0]].key == batches[0][0].keys[0] == intact.keys[0]
    kept = [place for place, key in enumerate(intact.keys) if key.index not in (5, 6)]
    assert torch.equal(intact.images[kept], batches[0][0].images[kept])


def test_random_damage_never_escapes(config, image_tree, tmp_path):
    """Whatever 60 random changes do to each kind of archive: a UserError, a bad image, or an image."""
    chance = random.Random(0)
    outcomes = {"refused": 0, "bad": 0, "good": 0}
    for kind, name in (("zip", "train.zip"), ("zip deflated", "train.zip"), ("tar", "train.tar")):
        folder = tmp_path / kind
        folder.mkdir()
        WRITERS[kind](image_tree, folder)
        whole = (folder / name).read_bytes()
        images = [path.read_bytes() for path, _ in listing(image_tree, "train")]
        for _ in range(60):
            damaged = bytearray(whole)
            # headers make up a small part of the file, so half of the changes aim at the directory or at a header
            start = chance.choice([0, len(whole) - 1500])
            place = chance.choice([chance.randrange(len(whole)), start + chance.randrange(600)])
            damaged[place] = chance.randrange(256)
            if chance.random() < 0.2:
                del damaged[place:]
            (folder / name).write_bytes(damaged)
            try:
                source = scan_split(config(kind.split()[0], folder), "train")
            except UserError:
                outcomes["refused"] += 1
                continue
            for index in range(21):
                image = load_image(source, index)
                outcomes["bad" if isinstance(image, BadImage) else "good"] += 1
                if kind != "tar" and not isinstance(image, BadImage):
                    # the checksum lets nothing else through
                    assert image.tobytes() == Decoder()(images[index]).tobytes()
    assert outcomes["refused"] > 30 and outcomes["bad"] > 10 and outcomes["good"] > 1000, outcomes


def test_members_that_unpack_to_more_than_they_say(config, image_tree, tmp_path, monkeypatch):
    """A deflate bomb: the directory says 100 bytes, the data unpack to 64 MB."""
    write_zip(image_tree, tmp_path)
    size = 2**26 + 123_457
    with zipfile.ZipFile(tmp_path / "train.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(size))
    content = (tmp_path / "train.zip").read_bytes()
    assert content.count(size.to_bytes(4, "little")) == 2
    (tmp_path / "train.zip").write_bytes(content.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with open(tmp_path / "train_map.txt", "a") as lines:
        lines.write("bomb.png\t0\n")
    source = scan_split(config("zip", tmp_path), "train")
    tracemalloc.start()
    assert load_image(source, 21) == BadImage(
        f"{tmp_path / 'train.zip'}@/bomb.png", "the zip archive is damaged here: length or checksum differ"
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    monkeypatch.setattr("ssm_train.common.decode.LARGEST_IMAGE_BYTES", 99)
    assert "bytes are no image" in load_image(source, 21).reason
    assert "bytes are no image" in load_image(scan_split(config("folder", image_tree), "train"), 0).reason
