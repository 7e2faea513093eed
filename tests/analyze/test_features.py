"""Features do not depend on how often their extraction was stopped; classifiers on them against brute force."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from analyze.features import main as features_main
from analyze.impl import features, linear_probe
from analyze.inputs import build_model
from analyze.linear_probe import main as linear_probe_main

TRAIN, VAL = 8, 5  # per class


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two classes of noise, dark and bright, and a file that is no image."""
    root, random = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for number, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 80, (32, 32, 3)) + 170 * number
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    (root / "val" / "light" / "9.png").write_text("no image")
    return root


@pytest.fixture
def model(monkeypatch):
    """One model for all calls of a test: weights are random."""
    made = build_model("vim_nano", arguments={"depth": 1, "embed_dim": 16})
    monkeypatch.setattr(features.inputs, "load_model", lambda name, checkpoint, which, allow_nonfinite: made)
    return made


def run(tree, out, *more: str) -> int:
    sizes = ["--shard", "5", "--batch-size", "2"]
    return features_main(["--model", "vim_nano", "--data-path", str(tree), "--out", str(out), *sizes, *more])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_continues_bit_for_bit(tree, tmp_path, model, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(tree, whole) == 0
    calls, kill_at = [], 5

    def dying(net, images, compute=features.features_of):
        calls.append(len(images))
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        return compute(net, images)

    monkeypatch.setattr(features, "features_of", dying)
    assert run(tree, stopped) == 130
    assert [path.name for path in stopped.glob("*.safetensors")] == ["train-00000-of-00004.safetensors"]
    (stopped / ".tmp-train-00001-of-00004.safetensors").write_bytes(b"half")  # what a kill inside a write leaves
    kept = (stopped / "train-00000-of-00004.safetensors").stat().st_ino
    calls.clear()
    kill_at = 10**9
    assert run(tree, stopped) == 0
    assert sum(calls) == 2 * (TRAIN + VAL) - 5  # only what was missing
    assert (stopped / "train-00000-of-00004.safetensors").stat().st_ino == kept
    assert contents(stopped) == contents(whole) and len(contents(whole)) == 4 + 3 + 2  # shards, manifest, lock
    capsys.readouterr()
    assert run(tree, stopped) == 0  # nothing left to do
    assert capsys.readouterr().out == f"{stopped / 'features.json'}\n"


def test_features_are_what_the_classifier_sees(tree, tmp_path, model, capsys):
    assert run(tree, tmp_path) == 0
    assert "unreadable image, left out: " in capsys.readouterr().err
    rows, targets = features.read_features(tmp_path, "val")
    assert rows.shape == (2 * VAL, 16) and targets.tolist() == [0] * VAL + [1] * VAL
    indices = torch.cat([load_file(path)["indices"] for path in sorted(tmp_path.glob("val-*"))])
    assert indices.tolist() == list(range(2 * VAL))  # without the last, which is no image
    image = Image.open(tree / "val" / "light" / "1.png")
    with torch.inference_mode():
        pixels = features.inputs.evaluation_transform("vim_nano", None)(image)[None]
        torch.testing.assert_close(model.head(rows[VAL + 1]), model(pixels)[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "3"], "was made with another batch, 2, now 3"),
        (["--size", "64"], "was made with another transform"),
        (["--shard", "0"], "--shard is 0, but at least 1"),
        (["--data-path", "nowhere"], "--data-path nowhere is not a folder"),
    ],
)
def test_another_folder_is_asked_for(more, message, tree, tmp_path, model, capsys):
    assert run(tree, tmp_path, "--splits", "val") == 0
    before = contents(tmp_path)
    assert run(tree, tmp_path, "--splits", "val", *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert contents(tmp_path) == before
    assert linear_probe_main(["--features", str(tmp_path)]) == 2
    assert "holds no features of 'train': run analyze/features.py with --splits train" in capsys.readouterr().err
    if more[0] == "--shard":  # the other split may come later
        assert (
            run(tree, tmp_path, "--splits", "train")
            == 0
            == linear_probe_main(["--features", str(tmp_path), "--k", "1"])
        )


@pytest.mark.parametrize("fit", [linear_probe.fit_lbfgs, linear_probe.fit_sgd])
def test_linear_probe_separates(fit):
    """Three clusters off the origin are told apart without a mistake."""
    targets = torch.arange(300) % 3
    rows = torch.randn(300, 8) + 20 * torch.eye(3, 8)[targets] + 100
    rows[:, 7] = 5  # a constant channel does no harm
    train, val = linear_probe.standardise(rows[:200], rows[200:])
    classifier = fit(train, targets[:200], 3, 1e-4, 30)
    assert linear_probe.accuracy(classifier(val), targets[200:]) == (100, 100)


def test_lbfgs_finds_the_minimum():
    """The gradient of the stated loss is zero there."""
    rows, targets, l2 = torch.randn(60, 4), torch.randint(3, (60,)), 0.1
    classifier = linear_probe.fit_lbfgs(rows, targets, 3, l2, 200)
    with torch.no_grad():
        slope = (classifier(rows).softmax(1) - torch.eye(3)[targets]).T / 60
        torch.testing.assert_close(slope @ rows + l2 * classifier.weight, torch.zeros(3, 4), atol=1e-4, rtol=0)
        torch.testing.assert_close(slope.sum(1), torch.zeros(3), atol=1e-4, rtol=0)


def test_nearest_neighbours_equal_brute_force(monkeypatch):
    monkeypatch.setattr(linear_probe, "_QUERIES", 7)
    train, targets, queries, temperature = torch.randn(40, 6), torch.randint(4, (40,)), torch.randn(17, 6), 0.5
    found = linear_probe.knn_scores(train, targets, queries, 4, [1, 5, 40], temperature)
    for k, scores in found.items():
        for row, query in zip(scores, queries, strict=True):
            cosines = [(t @ query / t.norm() / query.norm()).item() for t in train]
            expected = torch.zeros(4)
            for index in sorted(range(40), key=lambda i: -cosines[i])[:k]:
                expected[targets[index]] += math.exp((cosines[index] - max(cosines)) / temperature)
            torch.testing.assert_close(row, expected)
    own = linear_probe.knn_scores(train, targets, train, 4, [1], 0.01)[1]
    assert linear_probe.accuracy(own, targets).top1 == 100
    assert linear_probe.accuracy(own, (targets + 1) % 4).top1 == 0


def test_probe_command(tree, tmp_path, model, capsys):
    """Dark and bright images are told apart even by random weights; the json holds the accuracies."""
    assert run(tree, tmp_path) == 0
    assert (
        linear_probe_main(["--features", str(tmp_path), "--k", "3", "1", "--out", str(tmp_path / "x" / "p.png")]) == 0
    )
    report = json.loads((tmp_path / "x" / "p.json").read_text())
    assert (report["train images"], report["val images"]) == (2 * TRAIN, 2 * VAL)
    assert report["linear"] == {"solver": "lbfgs", "l2": 1e-4, "top1": 100, "top5": 100, "top1 on train": 100}
    assert report["knn"]["1"]["top1"] == report["knn"]["3"]["top1"] == 100
    (tmp_path / "train-00002-of-00004.safetensors").unlink()
    capsys.readouterr()
    for more, message in (
        (["--k", "17"], "lacks train-00002-of-00004.safetensors and 0 more: run its analyze/features.py again"),
        (["--temperature", "0"], "--temperature 0 and --epochs 100 must be above 0"),
        (["--features", "nowhere"], "nowhere holds no readable features.json"),
        (["--out", "probe.pdf"], "--out probe.pdf does not end in .png"),
    ):
        assert linear_probe_main(["--features", str(tmp_path), *more]) == 2
        assert message in capsys.readouterr().err
