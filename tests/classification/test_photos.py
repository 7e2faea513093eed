"""A person's own photographs: what is read, what is left out and said, and how they are split."""

import io
import os
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from analyze import image_files
from ssm_train.common import decode
from ssm_train.common.decode import Decoder
from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config
from ssm_train.data.build import scan_split
from ssm_train.data.sources import photos
from tests.classification.formats import encoded

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def picture(number: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def fill(folder, count, first=0):
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def found(tiny_cfg):
    """found(folder, split, key, value, ...) -> its source."""

    def scan(root, split="train", *opts):
        pairs = ["DATA.DATASET", "photos", "DATA.DATA_PATH", str(root), "MODEL.NUM_CLASSES", "None", *map(str, opts)]
        return scan_split(load_config(str(tiny_cfg), pairs), split)

    return scan


def names(source) -> list[str]:
    return [os.path.relpath(source.name(index), source.root) for index in range(len(source))]


@pytest.fixture
def pets(tmp_path):
    for number, name in enumerate(('a "cat"', "dog's", "Äffchen 猿")):
        fill(tmp_path / "pets" / name, 10, 10 * number)
    return tmp_path / "pets"


def test_a_fifth_of_every_class_is_set_apart_by_the_seed(pets, found):
    train, val = found(pets), found(pets, "val")
    assert train.classes == val.classes == ['a "cat"', "dog's", "Äffchen 猿"]
    assert np.bincount(train.targets).tolist() == [8, 8, 8] and np.bincount(val.targets).tolist() == [2, 2, 2]
    assert not {*names(train)} & {*names(val)} and len({*names(train), *names(val)}) == 30
    assert val.notes[0] == (
        "3 classes: 24 images to train on, 6 to validate with, set apart by DATA.VAL_SHARE 0.2 and SEED 0"
    )
    assert val.notes[1:] == ['  a "cat": 8 + 2', "  dog's: 8 + 2", "  Äffchen 猿: 8 + 2"]
    # the same again, elsewhere too; another with another seed
    shutil.copytree(pets, pets.with_name("moved"))
    assert names(found(pets.with_name("moved"), "val")) == names(val)
    other = names(found(pets, "val", "SEED", 1))
    assert len(other) == 6 and set(other) != set(names(val))
    assert len(found(pets, "val", "DATA.VAL_SHARE", 0.5)) == 15
    # at least one is for validation, and at least one is not
    assert (
        len(found(pets, "val", "DATA.VAL_SHARE", 0.001)) == 3
        and len(found(pets, "train", "DATA.VAL_SHARE", 0.999)) == 3
    )
    # what becomes of one class does not depend on another
    fill(pets / "eel", 5, 90)
    assert set(names(val)) < set(names(found(pets, "val")))


def test_splits_of_folders_are_taken_as_they_are(tmp_path, found):
    for split, count in (("Train", 3), ("valid", 2), ("test", 1)):
        for number, name in enumerate(("cat", "dog")):
            fill(tmp_path / split / name, count, 10 * number)
    train, val = found(tmp_path), found(tmp_path, "val")
    assert (len(train), len(val)) == (6, 4) and val.root == tmp_path / "valid"
    assert val.notes == [f"2 classes, 4 images in {tmp_path / 'valid'}", "not used: test"]
    shutil.rmtree(tmp_path / "valid")
    assert found(tmp_path, "val").root == tmp_path / "test"
    # pictures without classes, as competitions hand them out, are no validation
    shutil.rmtree(tmp_path / "test")
    fill(tmp_path / "test", 2)
    val = found(tmp_path, "val")
    assert val.root == tmp_path / "Train" and len(val) == 2 and "not used: test" in val.notes
    # to evaluate, that part is enough
    fill(tmp_path / "new" / "val" / "cat", 2)
    fill(tmp_path / "new" / "val" / "dog", 2, 10)
    assert len(found(tmp_path / "new", "val")) == 4
    with pytest.raises(UserError, match="new holds val/, but no train/ with class folders beside it"):
        found(tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    # a class may be called so
    shutil.rmtree(tmp_path / "Train")
    shutil.rmtree(tmp_path / "test")
    fill(tmp_path / "train", 3)
    fill(tmp_path / "bus", 3, 10)
    assert found(tmp_path).classes == ["bus", "train"]


def test_what_is_none_of_the_users_is_not_seen(pets, found):
    for name in (".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir"):
        fill(pets / name, 1)
        fill(pets / "dog's" / name, 1)
    for name in ("._0.png", ".hidden.jpg", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (pets / "dog's" / name).write_bytes(b"x")
    source = found(pets)
    assert len(source) == 24 and len(source.classes) == 3 and len(source.notes) == 4


def test_the_same_in_the_layout_of_imagenet(own_tree, config):
    fill(own_tree / "train" / ".ipynb_checkpoints", 1)
    fill(own_tree / "train" / "cat" / "@eaDir", 1)
    (own_tree / "train" / "cat" / "._0.png").write_bytes(b"x")
    source = scan_split(config("folder", own_tree), "train")
    assert source.classes == ["cat", "dog", "eel"] and len(source) == 21


def test_what_cannot_be_read_is_counted_and_named(pets, found, monkeypatch):
    cat = pets / 'a "cat"'
    (cat / "broken.jpg").write_bytes(b"no image")
    (cat / "empty.png").touch()
    (cat / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (cat / "gone.jpg").symlink_to(cat / "nowhere")
    os.mkfifo(cat / "pipe.jpg")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(cat / "deep.png")
    Image.new("1", (12000, 9000)).save(cat / "large.png")
    (cat / "notes.txt").write_text("")
    (cat / "film.MOV").write_text("")
    picture(50).save(pets / "stray.jpg")
    monkeypatch.setattr(decode, "formats", lambda: decode._FORMATS)
    source = found(pets)
    assert len(source) == 24
    said = "\n".join(source.notes)
    for part in (
        "left out, no images that are read here: 1 .mov, 1 .txt",
        f"left out, 1 images that lie in {pets} itself and not in the folder of a class",
        'not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)): a "cat"/broken.jpg, a "cat"/empty.png',
        'pillow-heif: pip install pillow-heif): a "cat"/phone.HEIC',
        'No such file or directory): a "cat"/gone.jpg',
    ):
        assert part in said, said
    # only the five most frequent reasons are told apart
    assert said.count("that cannot be read (") == 5 and "left out for other reasons, 1" in said
    # a range makes the deep one an image
    assert len(found(pets, "train", "DATA.RANGE", "0,600")) + len(found(pets, "val", "DATA.RANGE", "0,600")) == 31


def test_reasons_of_single_images(tmp_path):
    def fault(name: str) -> str:
        return photos._fault(str(tmp_path / name), Decoder())

    Image.new("1", (12000, 9000)).save(tmp_path / "large.png")
    assert "12000x9000 pixels" in fault("large.png") or "108000000 pixels" in fault("large.png")
    Image.new("1", (60, 1)).save(tmp_path / "long.png")
    assert fault("long.png") == "60x1 pixels: its sides are more than 50 to 1"
    os.mkfifo(tmp_path / "pipe.png")
    assert fault("pipe.png") == "not a regular file" and fault("none.png") == "No such file or directory"
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert "symbolic links" in fault("loop.png")
    picture(0).save(tmp_path / "good.png")
    assert fault("good.png") == ""
    # a file that has changed is looked at anew
    (tmp_path / "good.png").write_bytes(b"")
    assert "not an image of a known format" in fault("good.png")


def test_copies_stay_on_one_side_and_are_named_across_classes(pets, found):
    dog = pets / "dog's"
    for number in range(10, 20):
        for copy in range(4):
            shutil.copy(dog / f"{number}.png", dog / f"copy {copy} of {number}.png")
    train, val = found(pets), found(pets, "val")
    sides = [{name.split("of ")[-1] for name in names(side) if "of " in name} for side in (train, val)]
    assert not sides[0] & sides[1] and len(sides[0]) == 8 and len(sides[1]) == 2
    shutil.copy(dog / "10.png", pets / 'a "cat"' / "wrong.png")
    [note] = [note for note in found(pets).notes if "several classes" in note]
    assert "label is wrong, 1: " in note and 'a "cat"/wrong.png = ' in note and "dog's/" in note


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda root: fill(root, 3), ("holds 3 images, but no class folders",)),
        (lambda root: root.mkdir(), ("holds neither folders nor images, but no class folders",)),
        (lambda root: fill(root / "cat", 3), ("holds one class folder, 'cat', but at least two are needed",)),
        (
            lambda root: [fill(root / "pets" / name, 3) for name in ("cat", "dog")],
            ("at least two are needed; did you mean --data-path", "my photos/pets?"),
        ),
        (
            lambda root: (fill(root / "cat", 3), (root / "dog").mkdir()),
            ("my photos/dog is empty; put images into it, or remove it",),
        ),
        (
            lambda root: (fill(root / "cat", 3), fill(root / "dog", 0), (root / "dog/a.jpg").write_bytes(b"x")),
            ("dog holds 1 files, but none is an image that can be read, e.g. ", "dog/a.jpg: not an image of a known"),
        ),
        (
            lambda root: [fill(root / f"{number:03}", 1, number) for number in range(100)],
            ("class '000' has one image", "at least two are needed, one to train on and one to check with"),
        ),
        (
            lambda root: (
                fill(root / "cat", 3),
                shutil.copy(fill(root / "dog", 1) / "0.png", root / "dog/copy.png"),
            ),
            ("class 'dog' has one image", "copies do not count"),
        ),
    ],
    ids=[
        "no folders",
        "nothing",
        "one class",
        "too high",
        "empty class",
        "unreadable class",
        "single images",
        "copies",
    ],
)
def test_folders_that_cannot_be_learnt_from(make, parts, tmp_path, found):
    make(tmp_path / "my photos")
    with pytest.raises(UserError) as error:
        found(tmp_path / "my photos")
    for part in parts:
        assert part in str(error.value)


def test_folders_in_classes_and_links_that_lead_back(tmp_path, found):
    for number, name in enumerate(("animals/cat", "animals/dog", "plants")):
        fill(tmp_path / name, 5, 10 * number)
    (tmp_path / "plants" / "loop").symlink_to(tmp_path)
    (tmp_path / "animals" / "self").symlink_to("self")
    source = found(tmp_path)
    assert source.classes == ["animals", "plants"] and len(source) == 12
    assert "class 'animals' has the images of all folders in it: cat, dog" in source.notes


def test_the_classes_of_many_are_listed_in_part(tmp_path, found):
    for number in range(40):
        fill(tmp_path / f"{number:02}", 2, 10 * number)
    notes = found(tmp_path).notes
    assert notes[0].startswith("40 classes: 40 images to train on, 40 to validate with")
    assert len(notes) == 32 and notes[-1] == "  and 10 more"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation, found, pets):
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(NOISE)
    stored.save(pets / "dog's" / "phone.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(pets / "dog's" / "phone.png")))
    data = (pets / "dog's" / "phone.png").read_bytes()
    assert np.array_equal(np.asarray(found(pets).decode(data)), upright)
    # published accuracies are of the pixels as they are stored
    assert np.array_equal(np.asarray(Decoder()(data)), NOISE)
    assert np.array_equal(upright, NOISE) == (orientation == 1)
    # formats that Pillow turns by itself, and 16 bits
    jpeg = encoded(stored, "JPEG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))))
    assert np.array_equal(np.asarray(Decoder(upright=True)(jpeg)), expected)
    tiff = encoded(stored, "TIFF", exif=exif)
    assert np.array_equal(np.asarray(Decoder(upright=True)(tiff)), upright)
    deep = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    turned = np.asarray(Decoder(range=(0, 65535), upright=True)(encoded(deep, exif=exif)))
    assert np.array_equal(turned[..., 0], upright[..., 0])


def test_broken_metadata_is_no_reason_to_refuse_a_photograph():
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0II*\0\xff\xff")
    assert Decoder(upright=True)(data).size == (60, 40)


def test_formats_of_phones_cameras_and_browsers(tmp_path, found):
    fill(tmp_path / "dog", 2, 90)
    cat = tmp_path / "cat"
    cat.mkdir()
    rgb = Image.fromarray(NOISE)
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(NOISE[..., 0]))
    kinds = {"a.jfif": (rgb, "JPEG"), "b.JPG": (rgb.convert("CMYK"), "JPEG"), "c.webp": (alpha, "WEBP")}
    kinds |= {"d.gif": (rgb.quantize(9), "GIF"), "e.tif": (rgb, "TIFF"), "f.bmp": (rgb, "BMP"), "g.png": (alpha, "PNG")}
    if features.check("avif"):  # from Pillow 11.3 on
        kinds["h.avif"] = (rgb, "AVIF")
    for name, (image, kind) in kinds.items():
        image.save(cat / name, kind)
    sources = [found(tmp_path), found(tmp_path, "val")]
    assert sum((source.targets == 0).sum() for source in sources) == len(kinds)
    for source in sources:
        for index in range(len(source)):
            if source.targets[index] == 0:
                image = source.decode(source.read(index))
                assert image.mode == "RGB" and image.size == (60, 40)


def test_heic_is_read_where_its_package_is(monkeypatch):
    registered = []
    package = types.SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    decode.formats.cache_clear()
    assert "HEIF" in decode.formats() and registered == [True]
    monkeypatch.undo()
    decode.formats.cache_clear()
    assert "HEIF" not in decode.formats()
    with pytest.raises(ValueError, match="a HEIC image, which needs the package pillow-heif: pip install pillow-heif"):
        Decoder()(b"\0\0\0\x18ftypheic" + bytes(100))


def test_commands_find_and_turn_photographs_as_training_does(pets, tiny_cfg, monkeypatch):
    (pets / "dog's" / ".git").mkdir()
    picture(0).save(pets / "dog's" / ".git" / "a.png")
    (pets / "dog's" / "._10.png").write_bytes(b"x")
    picture(0).save(pets / "dog's" / "z.JFIF", "JPEG")
    assert [path.name for path in image_files.find_images([pets / "dog's"])] == [
        *(f"{number}.png" for number in range(10, 20)),
        "z.JFIF",
    ]
    assert image_files.image_decoder(None).upright and image_files.RGB.upright
    for dataset in ("photos", "folder"):
        cfg = load_config(str(tiny_cfg), ["DATA.DATASET", dataset, "DATA.RANGE", "0,99"])
        monkeypatch.setattr(image_files, "run_config", lambda checkpoint, cfg=cfg: cfg)
        decoder = image_files.image_decoder(pets)
        assert decoder.upright == (dataset == "photos") and decoder.range == (0, 99) and decoder.option == "--range"
        assert image_files.image_decoder(pets, [1, 5]).range == (1, 5)
