"""ssm_train.data.imagenet_val, with a small development kit of the form of ImageNet's."""

import tarfile

import numpy as np
import pytest
import scipy.io

from ssm_train.data.imagenet_val import classes_of_images, main

WNIDS = ["n01440764", "n01443537", "n01484850"]
TRUTH = [2, 1, 3, 3, 1]  # classes of the images, from 1


@pytest.fixture
def devkit(tmp_path, monkeypatch):
    """Three classes and what is above them; the file has another MD5 sum than ImageNet's."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(n + 1, wnid, f"fish {n}, a fish", "it swims", 0) for n, wnid in enumerate(WNIDS)]
    synsets = np.array([*rows, (1001, "n00000001", "animal", "it lives", 3)], dtype=kinds)
    data = tmp_path / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    scipy.io.savemat(data / "meta.mat", {"synsets": synsets})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{n}\n" for n in TRUTH))
    path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(data.parent, "ILSVRC2012_devkit_t12")
    monkeypatch.setattr("torchvision.datasets.imagenet.check_integrity", lambda file, md5=None: True)
    return path


@pytest.fixture
def val(tmp_path):
    folder = tmp_path / "val"
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_text(str(number))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.JPEG")}


EXPECTED = {f"{WNIDS[kind - 1]}/ILSVRC2012_val_{n:08d}.JPEG": str(n) for n, kind in enumerate(TRUTH, 1)}


def test_images_are_sorted_and_a_stopped_sorting_is_finished(devkit, val, capsys):
    assert classes_of_images(devkit) == [WNIDS[kind - 1] for kind in TRUTH]
    (val / WNIDS[2]).mkdir()
    (val / "ILSVRC2012_val_00000003.JPEG").rename(val / WNIDS[2] / "ILSVRC2012_val_00000003.JPEG")
    for moved in (4, 0):
        assert main(["--devkit", str(devkit), "--val", str(val)]) == 0
        assert f"val: {moved} images moved" in capsys.readouterr().out
        assert contents(val) == EXPECTED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda val: (val / "ILSVRC2012_val_00000002.JPEG").unlink(),
            "lacks 1 of 5 images, e.g. ILSVRC2012_val_00000002",
        ),
        (lambda val: (val / "notes.txt").touch(), "notes.txt is no image called like"),
        (lambda val: (val / "ILSVRC2012_val_00000006.JPEG").touch(), "is none of the 5 validation images"),
    ],
)
def test_nothing_is_moved_of_another_folder(devkit, val, change, message, capsys):
    change(val)
    before = contents(val)
    assert main(["--devkit", str(devkit), "--val", str(val)]) == 2
    assert message in capsys.readouterr().err and contents(val) == before


def test_another_file_is_no_development_kit(tmp_path, val, capsys):
    """By its MD5 sum, before anything in it is read."""
    (tmp_path / "kit.tar.gz").write_bytes(b"something else")
    assert main(["--devkit", str(tmp_path / "kit.tar.gz"), "--val", str(val)]) == 2
    assert "is not ILSVRC2012_devkit_t12.tar.gz: its MD5 sum is another" in capsys.readouterr().err
    assert main(["--devkit", str(tmp_path / "none"), "--val", str(val)]) == 2
    assert "none does not exist" in capsys.readouterr().err
