"""A folder of scenes is complete, verified when it is there, or refused; nothing of others is touched."""

import pytest

from ssm_mm.digit_scenes import make_scene
from ssm_mm.scene_folder import scenes_command

FEW = ["--train=2", "--val=1"]


def main(argv):
    """The command of a layout that tells how many digits each scene has."""

    def write_split(folder, split, scenes):
        (folder / f"{split}.txt").write_text(" ".join(str(len(scene.instances)) for scene in scenes))

    return scenes_command(argv, "numbers", "NUMBERS", write_split)


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_written_once_and_verified(tmp_path, capsys):
    out = tmp_path / "scenes"
    assert main(["--out", str(out), *FEW]) == 0
    before = files(out)
    assert set(before) == {"train.txt", "val.txt", "digit_scenes.json"}
    assert before["train.txt"] == " ".join(str(len(make_scene("train", i).instances)) for i in range(2)).encode()
    assert main(["--out", str(out), *FEW]) == 0
    assert capsys.readouterr().out == f"digit scenes: {out} written\ndigit scenes: {out} is complete\n"
    assert files(out) == before and [path.name for path in tmp_path.iterdir()] == ["scenes"]

    assert main(["--out", str(out), "--train=3", "--val=1"]) == 2
    assert "train 2, val 1, but layout NUMBERS, train 3, val 1 is asked for" in capsys.readouterr().err
    changed = out / "val.txt"
    changed.write_text("9")
    assert main(["--out", str(out), *FEW]) == 2
    assert f"{changed} is missing or was changed: delete {out}" in capsys.readouterr().err


@pytest.mark.parametrize("manifest", [None, "[]", "{}", "torn {", '{"files": 3}'])
def test_a_foreign_folder_is_refused(tmp_path, capsys, manifest):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    if manifest is not None:
        (tmp_path / "digit_scenes.json").write_text(manifest)
    before = files(tmp_path)
    assert main(["--out", str(tmp_path), *FEW]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not empty and holds no readable digit_scenes.json" in error
    assert files(tmp_path) == before


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("a file")
    for out, reason in ((tmp_path / "file", "Not a directory"), (tmp_path / "file" / "below", "Not a directory")):
        assert main(["--out", str(out), *FEW]) == 2
        assert capsys.readouterr().err == f"error: cannot write the scenes to {out}: {reason}\n"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["--out", ".", *FEW]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write the scenes to .: ")
    assert main(["--out", str(tmp_path / "new"), "--train=0"]) == 2
    assert capsys.readouterr().err == "error: --train 0: must be at least 1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
