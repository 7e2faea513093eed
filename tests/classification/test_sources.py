"""Every format of image data: the same images and labels as the folder they were made from, and what is refused."""

import io
import json
import multiprocessing
import pickle
import sys
import tarfile
import zipfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from ssm_train.common.decode import Decoder
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.data.build import check_same_classes, eval_loader, scan_split, train_loader
from ssm_train.data.dataset import BadImage, load_image
from ssm_train.data.sources import FORMATS, cached
from tests.classification.formats import (
    SPLITS,
    WRITERS,
    add,
    listing,
    table_of,
    write_cifar,
    write_tar,
    write_zip,
)

CPU = World(0, 1, torch.device("cpu"))


def contents(source) -> list[tuple[bytes, int]]:
    return [(source.read(index), int(source.targets[index])) for index in range(len(source))]


def read_in_worker(source, index: int) -> tuple[bytes, int]:
    return source.decode(source.read(index)).tobytes(), int(source.targets[index])


@pytest.mark.parametrize("kind", WRITERS)
def test_same_images_as_the_folder(kind, config, image_tree, tmp_path):
    WRITERS[kind](image_tree, tmp_path)
    for split in SPLITS:
        folder = scan_split(config("folder", image_tree), split)
        source = scan_split(config(kind.split()[0], tmp_path), split)
        assert len(source) == len(folder) == {"train": 21, "val": 15}[split]
        assert contents(source) == contents(folder)
        assert [tuple(pair) for pair in contents(source)] == [
            (path.read_bytes(), label) for path, label in listing(image_tree, split)
        ]
        by_name = kind in ("tar", "tar shards", "parquet")
        assert source.classes == (["cat", "dog", "eel"] if by_name else ["0", "1", "2"])
    check_same_classes(source, source)
    # what the loaders give: augmentation, order and workers do not see the format
    options = "DATA.BATCH_SIZE", 4, "AUG.HFLIP", 0.5, "AUG.REPROB", 0.5
    plain = config("folder", image_tree, *options)
    other = config(kind.split()[0], tmp_path, *options, "DATA.NUM_WORKERS", 2)
    loaders = [train_loader(cfg, scan_split(cfg, "train"), CPU) for cfg in (plain, other)]
    for one, two in zip(*loaders, strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.targets, two.targets) and one.keys == two.keys


def test_any_index_first_after_pickling_and_in_spawned_workers(config, image_tree, tmp_path):
    expected = [read_in_worker(scan_split(config("folder", image_tree), "train"), index) for index in (20, 3, 11)]
    sources = {}
    for kind, write in WRITERS.items():
        (tmp_path / kind).mkdir()
        write(image_tree, tmp_path / kind)
        sources[kind] = scan_split(config(kind.split()[0], tmp_path / kind), "train")
        sources[kind].read(0)
    sources["cached"] = cached(sources["zip"], "part", World(1, 2, CPU.device))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for kind, source in sources.items():
            copy = pickle.loads(pickle.dumps(source))
            assert [read_in_worker(copy, index) for index in (20, 3, 11)] == expected, kind
            remote = [pool.submit(read_in_worker, source, index) for index in (20, 3, 11)]
            assert [result.result() for result in remote] == expected, kind


def test_names_for_messages(config, image_tree, tmp_path):
    expected = {
        "zip": f"{tmp_path}/zip/train.zip@/dog/6.png",
        "tar": f"{tmp_path}/tar/train.tar@/dog/6.png",
        "tar samples": f"{tmp_path}/tar samples/train-0001.tar@/000005.png",
        "parquet": f"{tmp_path}/parquet/data/train-00001-of-00002.parquet row 5",
        "imagenet22k": f"{tmp_path}/imagenet22k/train/dog/6.png",
    }
    for kind, name in expected.items():
        (tmp_path / kind).mkdir()
        WRITERS[kind](image_tree, tmp_path / kind)
        assert scan_split(config(kind.split()[0], tmp_path / kind), "train").name(13) == name
    assert scan_split(config("folder", image_tree), "train").name(13) == str(image_tree / "train/dog/6.png")


@pytest.mark.parametrize(("kind", "before"), [("cifar10", b""), ("cifar100", b"\x07")])
def test_cifar(kind, before, config, refused, tmp_path):
    random_pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32)).astype(np.uint8)
    labels = [2, 0, 1, 0, 2, 1, 0]
    records = [(before + bytes([label]), p.tobytes()) for label, p in zip(labels, random_pixels, strict=True)]
    write_cifar(tmp_path, kind, records)
    for split in SPLITS:
        source = scan_split(config(kind, tmp_path), split)
        assert source.targets.tolist() == labels and source.classes == ["cat", "dog", "eel"]
        for index in range(7):
            image = source.decode(source.read(index))
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), random_pixels[index].transpose(1, 2, 0))
    last = next(iter((tmp_path).rglob("test*.bin")))
    assert source.name(6) == f"{last} record 6"
    held = cached(source, "full", CPU)
    last.unlink()
    assert held.decode(held.read(6)).tobytes() == random_pixels[6].transpose(1, 2, 0).tobytes()
    assert load_image(source, 6) == BadImage(f"{last} record 6", f"[Errno 2] No such file or directory: '{last}'")
    refused(kind, f"has no {last.name}", "binary.tar.gz", split="val")
    last.write_bytes(b"".join(label + pixels for label, pixels in records)[:-1])
    refused(kind, f"{last} is damaged", split="val")
    last.write_bytes(records[0][0] + records[0][1] + before + b"\x03" + records[0][1])
    refused(kind, f"{last} record 1 has the label 3", "from 0 to 2", split="val")
    refused(kind, "holds 3 classes", "NUM_CLASSES is 10", opts=("MODEL.NUM_CLASSES", 10))
    folder = last.parent
    folder.rename(tmp_path / "elsewhere")
    refused(kind, "has no", "it must hold")
    pickles = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[kind]
    (tmp_path / pickles).mkdir()
    refused(kind, "only the python version: pickles, which are never executed", "binary.tar.gz")


def test_folder_of_the_wrong_format(refused, config, tmp_path):
    refused("imagenet", "DATA.DATASET is 'imagenet'", *map(repr, FORMATS))
    for kind, missing in {
        "folder": "no folder 'train'",
        "zip": "no train.zip",
        "tar": "has none of train.tar",
        "parquet": "has none of train[-_.]*parquet",
        "imagenet22k": "has none of train.json",
        "cifar10": "no data_batch_1.bin",
        "cifar100": "no train.bin",
    }.items():
        refused(kind, f"--data-path {tmp_path}", missing, "it must hold")
        with pytest.raises(UserError, match="nowhere is not a folder; it must hold"):
            scan_split(config(kind, tmp_path / "nowhere"), "train")
        with pytest.raises(UserError, match="no data set given: add --data-path FOLDER; it must hold"):
            scan_split(config(kind, ""), "train")


HARMFUL = ("../evil.png", "cat/../../evil.png", "/etc/evil.png", "C:\\evil.png", "cat\\..\\evil.png")


@pytest.mark.parametrize("name", HARMFUL)
def test_paths_out_of_the_archive_are_refused(name, refused, image_tree, tmp_path):
    write_zip(image_tree, tmp_path)
    with zipfile.ZipFile(tmp_path / "train.zip", "a") as archive:
        archive.writestr(name, b"x")
    refused("zip", f"{tmp_path / 'train.zip'} is refused", repr(name), "outside the archive")
    write_tar(image_tree, tmp_path)
    with tarfile.open(tmp_path / "train.tar", "a") as archive:
        add(archive, name, b"x")
    refused("tar", f"{tmp_path / 'train.tar'} is refused", repr(name), "outside the archive")
    (tmp_path / "train.json").write_text(json.dumps([["cat/1.png", 0], [name, 1]]))
    refused("imagenet22k", repr(name), "outside")


def test_links_and_devices_are_refused(refused, image_tree, tmp_path):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        write_tar(image_tree, tmp_path)
        with tarfile.open(tmp_path / "train.tar", "a") as archive:
            member = tarfile.TarInfo("cat/odd.png")
            member.type, member.linkname = kind, "cat/0.png"
            archive.addfile(member)
        refused("tar", f"{tmp_path / 'train.tar'} is refused", "'cat/odd.png' is a link, a device")
    for mode in (0o120777, 0o020666, 0o060666, 0o010666):
        write_zip(image_tree, tmp_path)
        with zipfile.ZipFile(tmp_path / "train.zip", "a") as archive:
            entry = zipfile.ZipInfo("cat/odd.png")
            entry.external_attr = mode << 16
            archive.writestr(entry, "0.png")
        refused("zip", f"{tmp_path / 'train.zip'} is refused", "'cat/odd.png' is a link or a device")


def test_zip_and_its_map(refused, config, image_tree, tmp_path):
    write_zip(image_tree, tmp_path)
    map_file, archive = tmp_path / "train_map.txt", tmp_path / "train.zip"
    lines = map_file.read_text().splitlines()

    def rewrite(*new: str) -> None:
        map_file.write_text("\n".join(new))

    expected = contents(scan_split(config("zip", tmp_path), "train"))
    rewrite(*(f"./{line}\r" for line in lines))
    assert contents(scan_split(config("zip", tmp_path), "train")) == expected
    rewrite(*lines[:3], "cat/lost.png\t0")
    refused("zip", f"{map_file} lists 'cat/lost.png', which is not in {archive}")
    for label in ("3", "-1", "x", "9" * 30, "1.0"):
        rewrite(*lines, f"cat/0.png\t{label}")
        refused("zip", f"{map_file} line 22 has the label", "NUM_CLASSES is 3", "from 0 to 2")
    rewrite(*lines, "cat/0.png 0")
    refused("zip", f"{map_file} line 22 is 'cat/0.png 0'", "path<TAB>label")
    rewrite(*lines[:14])
    refused("zip", f"{archive} holds no image of class '2'")
    rewrite(*lines[:7])
    refused("zip", "no image of class '1' (nor of 1 others)")
    rewrite("", " ")
    refused("zip", f"{map_file} lists no images")
    map_file.write_bytes(b"\xff\xfe\xff")
    refused("zip", f"cannot read {map_file}")
    map_file.unlink()
    refused("zip", "has no train_map.txt", "it must hold")
    rewrite(*lines)
    archive.write_bytes(archive.read_bytes()[:-30])
    refused("zip", f"{archive} is damaged or no zip archive")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as other:
        other.writestr("cat/0.png", b"x")
    refused("zip", "'cat/0.png' is encrypted or compressed", "zip -r -0 train.zip")


def test_tar_mistakes(refused, image_tree, tmp_path):
    write_tar(image_tree, tmp_path)
    path = tmp_path / "train.tar"
    whole = path.read_bytes()
    for tool, packed in {"gunzip": "gz", "bunzip2": "bz2", "unxz": "xz"}.items():
        with tarfile.open(path, f"w:{packed}") as archive:
            add(archive, "cat/0.png", b"x")
        refused("tar", f"{path} is compressed", f"{tool} {path}")
        path.rename(tmp_path / f"train.tar.{packed}")
        refused("tar", f"train.tar.{packed} is compressed", tool)
        (tmp_path / f"train.tar.{packed}").unlink()
    path.write_bytes(b"not an archive" * 100)
    refused("tar", f"{path} is damaged or no tar archive")
    path.write_bytes(b"")
    refused("tar", f"{path} is damaged or no tar archive")
    # cut between two members, cut inside one, and a header that tarfile would take for the end
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        border = archive.getmembers()[5].offset
    for damaged in (whole[:border], whole[: border + 700], whole[:border] + b"x" * 512 + whole[border + 512 :]):
        path.write_bytes(damaged)
        refused("tar", f"{path} is damaged or no tar archive")
    for members, parts in {
        ("0.png",): ("train.tar@/0.png is in no class folder",),
        ("cat/0.txt",): ("holds no images", ".png"),
        ("cat/0.png", "dog/0.png"): ("holds 2 class folders", "NUM_CLASSES is 3"),
    }.items():
        with tarfile.open(path, "w") as archive:
            for name in members:
                add(archive, name, b"x")
        refused("tar", *parts)


def test_tar_sample_mistakes(refused, tmp_path):
    labels = {"a.cls": b"0", "b.cls": b"1", "c.json": b'{"label": 2}'}
    images = {"a.jpg": b"x", "b.jpg": b"x", "c.jpg": b"x"}
    for change, parts in {
        (("c.json", b"[" * 10**5),): ("c.jpg is no number",),
        (("d.jpg", b"x"),): ("train.tar@/d.jpg has no label", "key.cls"),
        (("d.cls", b"1"),): ("sample 'd' has a label, but no image",),
        (("b.cls", b"one"),): ("the label of", "b.jpg is no number"),
        (("b.cls", b"1.0"),): ("b.jpg is no number",),
        (("c.json", b'{"class": 2}'),): ("c.jpg is no number",),
        (("c.json", b"{"),): ("c.jpg is no number",),
        (("c.json", b" " * 2**20 + b"1"),): ("c.jpg is no number",),
        (("b.cls", b"3"),): ("b.jpg has the label 3", "from 0 to 2"),
        (("b.cls", b"0"),): ("no image of class '1'",),
    }.items():
        with tarfile.open(tmp_path / "train.tar", "w") as archive:
            for name, data in (images | labels | dict(change)).items():
                add(archive, name, data)
        refused("tar", *parts)


def test_parquet_mistakes(refused, config, image_tree, tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    images = listing(image_tree, "train")
    table = table_of(images)
    parquet.write_table(table, path, row_group_size=4)
    assert scan_split(config("parquet", tmp_path), "train").classes == ["0", "1", "2"]
    whole = path.read_bytes()
    for damaged in (whole[:-50], b"", b"PAR1" + whole[4:-4], whole[:-8] + b"\xff\xff\xff\x7fPAR1"):
        path.write_bytes(damaged)
        refused("parquet", f"{path} is damaged or no parquet file")
    for columns in ({"image": [b"x"], "label": [0]}, {"image": [{"bytes": b"x"}], "label": ["cat"]}, {"label": [0]}):
        parquet.write_table(pa.table(columns), path)
        refused("parquet", f"{path} must have columns image: struct<bytes, path> and label: integer, not")
    parquet.write_table(table_of([(images[0][0], 0), (images[0][0], 3)]), path)
    refused("parquet", f"{path} row 1 has the label 3", "NUM_CLASSES is 3")
    parquet.write_table(table_of([(images[0][0], 0), (images[0][0], None)]), path)
    refused("parquet", f"{path} row 1 has no label")
    parquet.write_table(table_of(images[:14]), path)
    refused("parquet", "no image of class '2'")
    parquet.write_table(table_of(images, ["cat", "dog"]), path)
    refused("parquet", "holds 2 classes, but MODEL.NUM_CLASSES is 3")
    path.rename(tmp_path / "train-00000-of-00003.parquet")
    parquet.write_table(table, tmp_path / "train-00002-of-00003.parquet")
    refused("parquet", "lacks train-00001-of-00003.parquet, one of 3 shards")
    parquet.write_table(table_of(images, ["cat", "dog", "eel"]), tmp_path / "train-00001-of-00003.parquet")
    (tmp_path / "train-00000-of-00003.parquet").write_bytes((tmp_path / "train-00002-of-00003.parquet").read_bytes())
    refused("parquet", "train-00001-of-00003.parquet has other class names than", "train-00000-of-00003.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused("parquet", "needs the package pyarrow: pip install pyarrow")


def test_image_list_mistakes(refused, config, tmp_path):
    path = tmp_path / "train.json"
    for content, parts in {
        "[": ("cannot read", "as JSON"),
        "{}": ("must be a list",),
        "[]": ("not empty",),
        '[["a.jpg", 0], ["b.jpg"]]': ("entry 1 is ['b.jpg']",),
        '[["a.jpg", 0], [3, 1]]': ("entry 1 is [3, 1]",),
        '[["a.jpg", 3]]': ("entry 0 has the label 3", "from 0 to 2"),
        '[["a.jpg", "1"]]': ("entry 0 has the label '1'",),
        '[["a.jpg", true]]': ("entry 0 has the label True",),
    }.items():
        path.write_text(content)
        refused("imagenet22k", str(path), *parts)
    path.write_text('[["a.jpg", 2]]')
    source = scan_split(config("imagenet22k", tmp_path), "train")
    assert (source.classes, source.targets.tolist()) == (["0", "1", "2"], [2])
    assert load_image(source, 0).path == str(tmp_path / "a.jpg")
    (tmp_path / "my_map_train.txt").write_text("[]")
    assert len(scan_split(config("imagenet22k", tmp_path), "train")) == 1


def test_classes_must_agree(config, image_tree, tmp_path):
    write_tar(image_tree, tmp_path)
    (tmp_path / "other").mkdir()
    with tarfile.open(tmp_path / "other" / "val.tar", "w") as archive:
        for name in ("cat", "dog", "fox"):
            add(archive, f"{name}/0.png", b"x")
    train = scan_split(config("tar", tmp_path), "train")
    val = scan_split(config("tar", tmp_path / "other"), "val")
    with pytest.raises(UserError, match="class folder 'eel' is in .*/train.tar but not in .*/other/val.tar"):
        check_same_classes(train, val)
    val.classes = ["dog", "cat", "eel"]
    with pytest.raises(UserError, match="same classes in another order"):
        check_same_classes(train, val)


@pytest.mark.parametrize("kind", ["zip", "tar", "parquet", "folder"])
def test_cache(kind, config, image_tree, tmp_path):
    """What is cached is served without the archive, and nothing else."""
    if kind == "folder":
        for split in SPLITS:
            for path, _ in listing(image_tree, split):
                copy = tmp_path / path.relative_to(image_tree)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    else:
        WRITERS[kind](image_tree, tmp_path)
    source = scan_split(config(kind, tmp_path), "train")
    expected = contents(source)
    assert cached(source, "no", CPU) is source
    part, full = cached(source, "part", World(1, 2, CPU.device)), cached(source, "full", World(1, 2, CPU.device))
    assert contents(part) == contents(full) == expected
    loaders = {mode: config(kind, tmp_path, "DATA.CACHE_MODE", mode) for mode in ("no", "part", "full")}
    loaders = {mode: eval_loader(cfg, scan_split(cfg, "val"), World(1, 2, CPU.device)) for mode, cfg in loaders.items()}
    before = {mode: list(loader) for mode, loader in loaders.items()}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.unlink()
    # pickled, a parquet source forgets its last row group
    source, part, full = pickle.loads(pickle.dumps((source, part, full)))
    assert contents(full) == expected
    for index in range(21):
        held = load_image(part, index)
        assert isinstance(load_image(source, index), BadImage)
        assert (
            isinstance(held, BadImage) if index % 2 == 0 else held.tobytes() == Decoder()(expected[index][0]).tobytes()
        )
    # of the 7 validation images of this rank, 3 are in the row group that was read last
    lost = 4 if kind == "parquet" else 7
    assert [sum(len(batch.bad) for batch in loaders[mode]) for mode in ("no", "part", "full")] == [lost, 0, 0]
    for one, two, three in zip(before["no"], loaders["part"], loaders["full"], strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.images, three.images)
