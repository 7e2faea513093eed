"""Losses against loops over images and classes in float64, their gradients against closed forms, and teachers."""

import math

import pytest
import timm
import torch
from safetensors.torch import save_file

from ssm_train.common.errors import UserError
from ssm_train.config.defaults import default_config
from ssm_train.record.checkpoint import Position
from ssm_train.record.store import CheckpointStore
from ssm_train.step.losses import (
    Criterion,
    build_criterion,
    cosub,
    hard_distillation,
    load_teacher,
    mesa_starts,
    soft_cross_entropy,
    soft_distillation,
)

from ..run_meta import META

B, K = 4, 5
CPU = torch.device("cpu")
IMAGES = torch.zeros(B, 3, 32, 32)


def config(**keys):
    """Defaults with e.g. TRAIN__LOSS="bce"."""
    cfg = default_config()
    for key, value in keys.items():
        section, name = key.split("__")
        cfg[section][name] = value
    return cfg


def random(seed: int, grad: bool = False) -> torch.Tensor:
    """(B, K) in float64"""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(B, K, generator=generator, dtype=torch.float64)).requires_grad_(grad)


CLASSES = torch.tensor([0, 4, 2, 2])
MIXED = torch.tensor([[0.3, 0, 0, 0, 0.7], [0, 1, 0, 0, 0], [0.5, 0, 0.5, 0, 0], [0, 0, 0, 0.9, 0.1]]).double()


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def ce_loop(logits: torch.Tensor, targets: list[list[float]]) -> float:
    """Mean over images of -sum_k p_k log softmax(z)_k."""
    rows = [log_softmax(row) for row in logits.tolist()]
    return sum(-sum(p * q for p, q in zip(t, row, strict=True)) for t, row in zip(targets, rows, strict=True)) / B


def bce_loop(logits: torch.Tensor, targets: list[list[float]]) -> float:
    """Mean over images and classes of -t log sigmoid(z) - (1 - t) log(1 - sigmoid(z))."""
    total = 0.0
    for row, wanted in zip(logits.tolist(), targets, strict=True):
        for z, t in zip(row, wanted, strict=True):
            p = 1 / (1 + math.exp(-z))
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    return total / (B * K)


def one_hot(on: float = 1.0, off: float = 0.0) -> list[list[float]]:
    return [[on if k == c else off for k in range(K)] for c in CLASSES.tolist()]


def test_cross_entropy_smooths_classes_but_not_mixed_targets():
    logits, criterion = random(0), Criterion(config(MODEL__LABEL_SMOOTHING=0.2), None)
    assert criterion.copies == 1
    expected = ce_loop(logits, one_hot(0.8 + 0.2 / K, 0.2 / K))
    assert criterion(IMAGES, logits, CLASSES).item() == pytest.approx(expected, rel=1e-12)
    assert criterion(IMAGES, logits, MIXED).item() == pytest.approx(ce_loop(logits, MIXED.tolist()), rel=1e-12)


def test_binary_cross_entropy_turns_every_mixed_class_on():
    logits, criterion = random(1), Criterion(config(TRAIN__LOSS="bce", MODEL__LABEL_SMOOTHING=0.0), None)
    assert criterion(IMAGES, logits, CLASSES).item() == pytest.approx(bce_loop(logits, one_hot()), rel=1e-12)
    on = [[1.0 if p > 0 else 0.0 for p in row] for row in MIXED.tolist()]
    assert criterion(IMAGES, logits, MIXED).item() == pytest.approx(bce_loop(logits, on), rel=1e-12)


def test_cosub_and_that_no_gradient_passes_through_the_twin():
    first, second = random(2, grad=True), random(3, grad=True)
    targets = torch.tensor(one_hot()).double()
    cfg = config(TRAIN__LOSS="bce", TRAIN__COSUB=True, MODEL__LABEL_SMOOTHING=0.0)
    criterion = Criterion(cfg, None)
    assert criterion.copies == 2
    loss = criterion(IMAGES, torch.cat([first, second]), CLASSES)
    a, b = first.detach(), second.detach()
    expected = bce_loop(a, targets.tolist()) + bce_loop(b, targets.tolist())
    expected += bce_loop(a, b.sigmoid().tolist()) + bce_loop(b, a.sigmoid().tolist())
    assert loss.item() == pytest.approx(expected / 4, rel=1e-12)
    assert torch.equal(loss, cosub(first, second, targets))
    loss.backward()
    scale = 4 * B * K
    torch.testing.assert_close(first.grad, (2 * a.sigmoid() - targets - b.sigmoid()) / scale)
    torch.testing.assert_close(second.grad, (2 * b.sigmoid() - targets - a.sigmoid()) / scale)


def test_mesa_adds_its_weight_times_the_cross_entropy_to_the_average():
    logits, average = random(4, grad=True), random(5)
    criterion = Criterion(config(TRAIN__MESA=1.5, MODEL__LABEL_SMOOTHING=0.0), None)
    target = average.softmax(-1)
    loss = criterion(IMAGES, logits, MIXED, average)
    base = criterion(IMAGES, logits, MIXED)
    assert base.item() == pytest.approx(ce_loop(logits.detach(), MIXED.tolist()), rel=1e-12)
    taught = ce_loop(logits.detach(), target.tolist())
    assert loss.item() == pytest.approx(base.item() + 1.5 * taught, rel=1e-12)
    assert soft_cross_entropy(logits, target).item() == pytest.approx(taught, rel=1e-12)
    loss.backward()
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, ((p - MIXED) + 1.5 * (p - target)) / B)


def test_mesa_begins_after_its_share_of_the_epochs():
    assert mesa_starts(config(TRAIN__MESA_START=0.25, TRAIN__EPOCHS=300)) == 75
    assert mesa_starts(config(TRAIN__MESA_START=0.25, TRAIN__EPOCHS=15)) == 3
    assert mesa_starts(config(TRAIN__MESA_START=0.0, TRAIN__EPOCHS=15)) == 0


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation(tau):
    logits, teacher = random(6, grad=True), random(7)
    expected = 0.0
    for student_row, teacher_row in zip(logits.tolist(), teacher.tolist(), strict=True):
        log_p, log_q = (log_softmax([value / tau for value in row]) for row in (student_row, teacher_row))
        expected += sum(math.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True))
    loss = soft_distillation(logits, teacher, tau)
    assert loss.item() == pytest.approx(tau**2 * expected / (B * K), rel=1e-12)
    loss.backward()
    difference = (logits.detach() / tau).softmax(-1) - (teacher / tau).softmax(-1)
    torch.testing.assert_close(logits.grad, tau * difference / (B * K))
    assert soft_distillation(teacher, teacher, tau).item() == pytest.approx(0, abs=1e-15)


def test_hard_distillation():
    logits, teacher = random(8), random(9)
    decisions = [[float(value == max(row)) for value in row] for row in teacher.tolist()]
    assert hard_distillation(logits, teacher).item() == pytest.approx(ce_loop(logits, decisions), rel=1e-12)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_shares_the_loss(kind):
    logits, taught = random(10), random(11)
    cfg = config(DISTILL__TYPE=kind, DISTILL__ALPHA=0.3, DISTILL__TAU=2.0, MODEL__LABEL_SMOOTHING=0.0)
    seen = []

    def teacher(images):
        seen.append(images)
        return taught

    loss = Criterion(cfg, teacher)(IMAGES, logits, CLASSES).item()
    by_teacher = soft_distillation(logits, taught, 2.0) if kind == "soft" else hard_distillation(logits, taught)
    assert loss == pytest.approx(0.7 * ce_loop(logits, one_hot()) + 0.3 * by_teacher.item(), rel=1e-12)
    assert len(seen) == 1 and seen[0] is IMAGES


def test_teacher_and_average_teach_both_copies():
    first, second, taught, average = random(12), random(13), random(14), random(15)
    keys = {"TRAIN__LOSS": "bce", "TRAIN__COSUB": True, "TRAIN__MESA": 2.0, "MODEL__LABEL_SMOOTHING": 0.0}
    criterion = Criterion(config(DISTILL__ALPHA=0.25, **keys), lambda images: taught)
    loss = criterion(IMAGES, torch.cat([first, second]), CLASSES, average)
    distilled = (soft_distillation(first, taught, 1.0) + soft_distillation(second, taught, 1.0)) / 2
    q = average.softmax(-1)
    mesa = (soft_cross_entropy(first, q) + soft_cross_entropy(second, q)) / 2
    base = cosub(first, second, torch.tensor(one_hot()).double())
    torch.testing.assert_close(loss, 0.75 * base + 0.25 * distilled + 2 * mesa)


# ---- teachers ----


@pytest.fixture
def teacher_file(tmp_path):
    """Weights of a vmamba_nano for 3 classes, and the network."""
    torch.manual_seed(0)
    network = timm.create_model("vmamba_nano", num_classes=3, drop_path_rate=0.5)
    path = tmp_path / "teacher.safetensors"
    save_file(network.state_dict(), path)
    return path, network.eval()


def teacher_config(path, name: str = "vmamba_nano", size: int = 32, classes: int = 3, amp: str = "off"):
    cfg = config(DISTILL__TEACHER=name, DISTILL__WEIGHTS=str(path), DATA__IMG_SIZE=size, MODEL__NUM_CLASSES=classes)
    cfg.AMP = amp
    return cfg


def test_teacher_predicts_without_gradient_and_dropped_paths(teacher_file):
    path, network = teacher_file
    predict = load_teacher(teacher_config(path), CPU)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    logits = predict(images)
    with torch.no_grad():  # by the same kernels
        expected = network(images)
    assert not logits.requires_grad and torch.equal(logits, expected) and torch.equal(logits, predict(images))


def test_teacher_computes_in_the_precision_of_training(teacher_file):
    path, network = teacher_file
    images = torch.randn(2, 3, 32, 32)
    logits = load_teacher(teacher_config(path, amp="bf16"), CPU)(images)
    assert logits.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(images).float()
    assert torch.equal(logits, expected) and not torch.equal(logits, network(images))


def test_criterion_has_a_teacher_where_one_is_named(teacher_file):
    path, network = teacher_file
    images, logits, targets = torch.randn(2, 3, 32, 32), torch.randn(2, 3), torch.tensor([0, 2])
    cfg = teacher_config(path)
    cfg.DISTILL.ALPHA, cfg.DISTILL.TYPE = 1.0, "hard"
    loss = build_criterion(cfg, CPU)(images, logits, targets)
    torch.testing.assert_close(loss, hard_distillation(logits, network(images)))
    cfg.DISTILL.TEACHER = ""
    alone = build_criterion(cfg, CPU)(images, logits, targets)
    torch.testing.assert_close(alone, torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1))


def test_images_are_normalised_as_the_teacher_was_trained(tmp_path):
    network = timm.create_model("test_vit", num_classes=3).eval()
    assert network.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    pixels = torch.rand(2, 3, 160, 160)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    predict = load_teacher(teacher_config(tmp_path / "teacher.safetensors", "test_vit", 160), CPU)
    torch.testing.assert_close(predict((pixels - mean) / std), network((pixels - 0.5) / 0.5))
    # a checkpoint folder is of this trainer, and saw our images
    store = CheckpointStore(tmp_path / "checkpoints", 1)
    folder = store.save(Position(1), model=network.state_dict(), ema=None, train_state={}, meta=META)
    predict = load_teacher(teacher_config(folder, "test_vit", 160), CPU)
    images = (pixels - mean) / std
    assert torch.equal(predict(images), network(images))


def test_teachers_that_cannot_teach(teacher_file, tmp_path):
    path, _ = teacher_file
    save_file(timm.create_model("test_vit3", num_classes=3).state_dict(), tmp_path / "vit.safetensors")
    cases = [
        (teacher_config(""), ["vmamba_nano has no weights", "DISTILL.WEIGHTS"]),
        (teacher_config(tmp_path / "none.pth"), ["DISTILL.WEIGHTS", "none.pth is neither"]),
        (teacher_config(path, "vmamba_nanno"), ["DISTILL.TEACHER 'vmamba_nanno'", "vmamba_nano"]),
        (teacher_config(path, classes=10), ["classifier.head.weight (3, 128) instead of (10, 128)"]),
        (teacher_config(path, "vssd_nano"), ["teacher.safetensors does not fit this VSSD", "missing"]),
        (
            teacher_config(tmp_path / "vit.safetensors", "test_vit3", 32),
            ["test_vit3 does not take images", "IMG_SIZE 32"],
        ),
    ]
    for cfg, parts in cases:
        with pytest.raises(UserError) as caught:
            build_criterion(cfg, CPU)
        for part in parts:
            assert part in str(caught.value), caught.value
        assert "new_head" not in str(caught.value)
