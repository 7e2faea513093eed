"""Writes one tree of class folders in every format of image data."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

SPLITS = ("train", "val")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def listing(tree: Path, split: str) -> list[tuple[Path, int]]:
    """The images of a split in the folder's order, with labels."""
    classes = sorted(path.name for path in (tree / split).iterdir())
    return [(path, label) for label, name in enumerate(classes) for path in sorted((tree / split / name).iterdir())]


def write_zip(tree: Path, out: Path, method: int = zipfile.ZIP_STORED) -> None:
    for split in SPLITS:
        lines = []
        with zipfile.ZipFile(out / f"{split}.zip", "w", method) as archive:
            archive.writestr("cat/", b"")
            for path, label in listing(tree, split):
                name = str(path.relative_to(tree / split))
                archive.write(path, name)
                lines.append(f"{name}\t{label}\n")
        (out / f"{split}_map.txt").write_text("".join(lines))


def write_tar(tree: Path, out: Path) -> None:
    """As `tar cf train.tar .` makes it, in any order."""
    for split in SPLITS:
        with tarfile.open(out / f"{split}.tar", "w") as archive:
            archive.add(tree / split, ".", recursive=False)
            for path, _ in reversed(listing(tree, split)):
                archive.add(path, f"./{path.relative_to(tree / split)}")


def write_tar_shards(tree: Path, out: Path) -> None:
    """Folders of shards, with the split's folder in the members' names and a file that is no image."""
    for split in SPLITS:
        folder = {"train": "train", "val": "validation"}[split]
        (out / folder).mkdir()
        for shard in range(3):
            with tarfile.open(out / folder / f"{shard:04d}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
                for path, _ in listing(tree, split)[shard::3]:
                    archive.add(path, f"{folder}/{path.relative_to(tree / split)}")
        with tarfile.open(out / folder / "0000.tar", "a") as archive:
            add(archive, f"{folder}/README", b"none")


def write_webdataset(tree: Path, out: Path) -> None:
    """Two shards; labels as .cls in the first, as .json in the second; keys repeat between shards."""
    for split in SPLITS:
        images = listing(tree, split)
        for shard, part in enumerate((images[:8], images[8:])):
            with tarfile.open(out / f"{split}-{shard:04d}.tar", "w") as archive:
                for number, (path, label) in enumerate(part):
                    add(archive, f"{number:06d}.png", path.read_bytes())
                    if shard:
                        add(archive, f"{number:06d}.json", json.dumps({"label": label, "class": "x"}).encode())
                    else:
                        add(archive, f"{number:06d}.json", b"{}")
                        add(archive, f"{number:06d}.cls", b"%d\n" % label)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def table_of(images: list[tuple[Path, int]], names: list[str] | None = None):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "label": label} for path, label in images]
    table = pa.Table.from_pylist(rows, pa.schema([("image", image), ("label", pa.int64())]))
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return table


def write_parquet(tree: Path, out: Path, **options) -> None:
    """As Hugging Face's hub lays it out: two shards per split, two row groups of at most 6 rows in each."""
    (out / "data").mkdir()
    for split, stem in (("train", "train"), ("val", "validation")):
        images = listing(tree, split)
        for shard, part in enumerate((images[:8], images[8:])):
            path = out / "data" / f"{stem}-{shard:05d}-of-00002.parquet"
            parquet.write_table(table_of(part, ["cat", "dog", "eel"]), path, row_group_size=6, **options)


def write_lists(tree: Path, out: Path) -> None:
    for split in SPLITS:
        entries = [[str(path.relative_to(tree)), label] for path, label in listing(tree, split)]
        (out / f"ILSVRC2011fall_whole_map_{split}.txt").write_text(json.dumps(entries))
        (out / split).symlink_to(tree / split)


def write_cifar(out: Path, kind: str, records: list[tuple[bytes, bytes]]) -> None:
    """The first four training files of CIFAR-10 get one record each."""
    if kind == "cifar10":
        folder, names = out / "cifar-10-batches-bin", "batches.meta.txt"
        parts = [[records[number]] for number in range(4)] + [records[4:]]
        files = {f"data_batch_{number + 1}.bin": part for number, part in enumerate(parts)} | {
            "test_batch.bin": records
        }
    else:
        folder, names = out / "cifar-100-binary", "fine_label_names.txt"
        files = {"train.bin": records, "test.bin": records}
    folder.mkdir()
    (folder / names).write_text("cat\ndog\neel\n\n")
    for name, part in files.items():
        (folder / name).write_bytes(b"".join(label + pixels for label, pixels in part))


WRITERS = {
    "zip": write_zip,
    "zip deflated": lambda tree, out: write_zip(tree, out, zipfile.ZIP_DEFLATED),
    "tar": write_tar,
    "tar shards": write_tar_shards,
    "tar samples": write_webdataset,
    "parquet": write_parquet,
    "imagenet22k": write_lists,
}
