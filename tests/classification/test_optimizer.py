"""Which parameters train, how they decay, at which rate: groups, steps, schedules and frozen parts."""

import math

import pytest
import timm
import torch
from torch import nn

import ssm_models  # noqa: F401
from ssm_train.common.errors import UserError
from ssm_train.config.defaults import default_config
from ssm_train.step.model import freeze, set_train_mode
from ssm_train.step.optimizer import build_optimizer, decay_counts
from ssm_train.step.schedule import Rates, build_schedule, resolve_rates
from ssm_train.step.state import load_optimizer_state, optimizer_state

NANOS = ("vmamba_nano", "vim_nano", "vssd_nano")
M0 = {"forward_type": "m0_noz", "ssm_d_state": 4, "norm_layer": "ln", "ssm_init": "v2"}


def config(**keys):
    """Defaults with e.g. TRAIN__EPOCHS=3, or TRAIN__SCHEDULER__PER="epoch"."""
    cfg = default_config()
    for key, value in keys.items():
        *sections, name = key.split("__")
        node = cfg
        for section in sections:
            node = node[section]
        assert name in node
        node[name] = value
    return cfg


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs)


def groups_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group for group in optimizer.param_groups for p in group["params"]}


# ---- weight decay ----


@pytest.mark.parametrize(("name", "kwargs"), [("vmamba_nano", {}), ("vmamba_nano", M0), ("vim_nano", {})])
def test_decay_ssm_is_what_the_original_trainers_do(name, kwargs):
    """Not decayed there: 1-D tensors, names ending in .bias, position embeddings and class tokens."""
    model = create(name, **kwargs)
    literal, intended = (
        {
            key
            for key, group in groups_by_name(model, build_optimizer(model, cfg.TRAIN, 1e-3)).items()
            if group["weight_decay"] == 0
        }
        for cfg in (config(TRAIN__DECAY_SSM=True), config())
    )
    assert literal == {
        key
        for key, parameter in model.named_parameters()
        if parameter.ndim <= 1 or key.endswith(".bias") or key in ("pos_embed", "cls_token")
    }
    marked = {"A_logs", "Ds", "dt_projs_bias", "A_log", "A_b_log"}
    of_the_scan = {key for key, p in model.named_parameters() if key.rpartition(".")[2] in marked and p.ndim > 1}
    assert of_the_scan and intended == literal | of_the_scan


def test_no_decay_at_all_makes_one_group():
    model = create("vssd_nano")
    optimizer = build_optimizer(model, config(TRAIN__WEIGHT_DECAY=0.0).TRAIN, 1e-3)
    assert decay_counts(optimizer) == (0, len(list(model.parameters())))


# ---- layer decay ----


def layers_of(name: str, model: nn.Module) -> dict[str, int]:
    """Layer of every parameter: the stem is 0, blocks count from 1 over all stages, the classifier is one above."""
    if name == "vim_nano":
        first, blocks = [0], len(model.layers)
    else:
        depths = [len(stage.blocks) for stage in model.layers]
        first, blocks = [sum(depths[:i]) for i in range(len(depths))], sum(depths)
    layers = {}
    for key, _ in model.named_parameters():
        parts = key.split(".")
        if parts[0] in ("patch_embed", "pos_embed", "cls_token"):
            layers[key] = 0
        elif parts[0] == "layers" and name == "vim_nano":
            layers[key] = int(parts[1]) + 1
        elif parts[0] == "layers" and parts[2] == "blocks":
            layers[key] = first[int(parts[1])] + int(parts[3]) + 1
        elif parts[0] == "layers":
            layers[key] = first[int(parts[1]) + 1]  # downsampling belongs to the last block before it
        elif "norm" in key:
            layers[key] = blocks
        else:
            layers[key] = blocks + 1
    return layers


@pytest.mark.parametrize("name", NANOS)
def test_layer_decay(name):
    model, cfg = create(name), config(TRAIN__LAYER_DECAY=0.5, TRAIN__EPOCHS=2, TRAIN__WARMUP_EPOCHS=1)
    optimizer = build_optimizer(model, cfg.TRAIN, 1e-3)
    layers = layers_of(name, model)
    top = max(layers.values())
    schedule = build_schedule(optimizer, cfg.TRAIN, Rates(base=1e-3, warmup=1e-4, minimum=1e-5), 10)
    for updates, rate in ((0, 1e-4), (5, (1e-3 + 1e-4) / 2), (10, 1e-3), (15, (1e-3 + 1e-5) / 2), (20, 1e-5)):
        schedule.set(updates)
        groups = groups_by_name(model, optimizer)
        assert set(groups) == set(layers)
        for key, group in groups.items():
            assert group["lr"] == pytest.approx(rate * 0.5 ** (top - layers[key]), rel=1e-12), (key, updates)
    listed = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    for key, group in groups.items():
        expected = 0 if parameters[key].ndim <= 1 or key in listed else 0.05
        assert group["weight_decay"] == expected, key


# ---- steps ----


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        self.bias = nn.Parameter(torch.tensor([0.5]))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_steps_with_nesterov_momentum(momentum):
    model = Tiny()
    cfg = config(TRAIN__OPTIMIZER="sgd", TRAIN__MOMENTUM=momentum, TRAIN__WEIGHT_DECAY=0.1)
    optimizer = build_optimizer(model, cfg.TRAIN, 0.01)
    expected = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    buffers = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, float(step + 1))
            gradient = step + 1 + (0.1 if name == "weight" else 0) * expected[name]
            buffers[name] = momentum * buffers[name] + gradient
            expected[name] = expected[name] - 0.01 * (gradient + momentum * buffers[name])
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("keys", "entries"),
    [
        ({"TRAIN__OPTIMIZER": "adamw"}, {"step", "exp_avg", "exp_avg_sq"}),
        ({"TRAIN__OPTIMIZER": "sgd"}, {"momentum_buffer"}),
        ({"TRAIN__OPTIMIZER": "sgd", "TRAIN__MOMENTUM": 0.0}, set()),
        ({"TRAIN__LAYER_DECAY": 0.5}, {"step", "exp_avg", "exp_avg_sq"}),
    ],
)
def test_state_travels_by_name_also_with_frozen_parts(keys, entries):
    """Three updates in a row equal two, the state in another optimizer, and one more."""
    cfg = config(TRAIN__FREEZE_STAGES=2, **keys)
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = create("vmamba_nano", drop_path_rate=0.0)
        freeze(model, cfg)
        return model, build_optimizer(model, cfg.TRAIN, 0.01)

    def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = start()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for _ in range(2):
        update(model, optimizer)
    saved = {
        name: {k: v.clone() for k, v in state.items()} for name, state in optimizer_state(model, optimizer).items()
    }
    assert set(saved) == (trained if entries else set())
    assert all(set(state) == entries for state in saved.values())
    other, other_optimizer = start()
    other.load_state_dict(model.state_dict())
    load_optimizer_state(other, other_optimizer, saved)
    update(model, optimizer)
    update(other, other_optimizer)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


# ---- schedules ----


def expected_rate(t: int, name: str, prefix: bool, unit: int, rates: Rates) -> float:
    """4 epochs, 1 of them warm-up; halved every epoch (step) or at epochs 2 and 3 (multistep)."""
    warmup, total = unit, 4 * unit
    if t < warmup:
        return rates.warmup + t * (rates.base - rates.warmup) / warmup
    if name == "step":
        return rates.base * 0.5 ** (t // unit)
    if name == "multistep":
        return rates.base * 0.5 ** ((t >= 2 * unit) + (t >= 3 * unit))
    s, length = (t - warmup, total - warmup) if prefix else (t, total)
    left = max(0.0, 1 - s / length)
    factor = (1 - math.cos(math.pi * left)) / 2 if name == "cosine" else left
    return rates.minimum + (rates.base - rates.minimum) * factor


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("per", ["update", "epoch"])
@pytest.mark.parametrize("name", ["cosine", "linear", "step", "multistep"])
def test_schedules(name, per, prefix):
    keys = {"NAME": name, "PER": per, "WARMUP_PREFIX": prefix, "DECAY_EPOCHS": 1, "DECAY_RATE": 0.5}
    cfg = config(TRAIN__EPOCHS=4, TRAIN__WARMUP_EPOCHS=1, TRAIN__SCHEDULER__MULTISTEPS=[2, 3])
    cfg.TRAIN.SCHEDULER.update(keys)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates, per_epoch = Rates(base=1.0, warmup=0.01, minimum=0.1), 7
    schedule = build_schedule(optimizer, cfg.TRAIN, rates, per_epoch)
    for updates in range(5 * per_epoch):
        if updates:
            schedule.set(updates)
        t, unit = (updates, per_epoch) if per == "update" else (updates // per_epoch, 1)
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(expected_rate(t, name, prefix, unit, rates), rel=1e-12), updates
    # any order: the rate depends on the number alone
    schedule.set(9)
    t, unit = (9, per_epoch) if per == "update" else (1, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected_rate(t, name, prefix, unit, rates), rel=1e-12)


def test_what_follows_the_batch():
    rates = {"TRAIN__BASE_LR": 5e-4, "TRAIN__WARMUP_LR": 1e-6, "TRAIN__MIN_LR": 1e-5}
    assert resolve_rates(config(**rates).TRAIN, 1024) == Rates(1e-3, 2e-6, 2e-5)
    assert resolve_rates(config(TRAIN__LR_SCALING="base", **rates).TRAIN, 1024) == Rates(1e-3, 1e-6, 1e-5)


# ---- frozen parts ----


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", NANOS)
def test_linear_probe_trains_the_classifier_alone(name):
    model = create(name, drop_path_rate=0.9)
    freeze(model, config(TRAIN__LINEAR_PROBE=True))
    head = "classifier.head" if name == "vmamba_nano" else "head"
    assert trains(model) == {f"{head}.weight", f"{head}.bias"}
    statistics = {key: value.clone() for key, value in model.named_buffers()}
    set_train_mode(model)
    assert model.get_classifier().training
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    assert all(torch.equal(value, statistics[key]) for key, value in model.named_buffers())
    optimizer = build_optimizer(model, config().TRAIN, 1e-3)
    assert decay_counts(optimizer) == (1, 1)


@pytest.mark.parametrize(
    ("name", "count", "frozen"),
    [
        ("vmamba_nano", 0, ()),
        ("vmamba_nano", 1, ("patch_embed.",)),
        ("vmamba_nano", 3, ("patch_embed.", "layers.0.", "layers.1.")),
        ("vssd_nano", 2, ("patch_embed.", "layers.0.")),
        ("vssd_nano", 4, ("patch_embed.", "layers.", "norm.")),
        ("vim_nano", 1, ("patch_embed.", "pos_embed", "cls_token")),
        ("vim_nano", 3, ("patch_embed.", "pos_embed", "cls_token", "layers.0.", "layers.1.")),
        ("test_resnet", 2, ("conv1.", "bn1.", "layer1.")),
    ],
)
def test_frozen_stages(name, count, frozen):
    model = create(name)
    cfg = config(TRAIN__FREEZE_STAGES=count, MODEL__NAME=name)
    freeze(model, cfg)
    assert trains(model) == {key for key, _ in model.named_parameters() if not key.startswith(frozen)}
    set_train_mode(nn.Sequential(model))
    for key, module in model.named_modules():
        if list(module.parameters(recurse=False)) or "drop_path" in key:
            assert module.training == (not f"{key}.".startswith(frozen)), key


def test_frozen_batch_norms_keep_their_statistics():
    model = create("vssd_nano")
    freeze(model, config(TRAIN__FREEZE_STAGES=2))
    before = {key: value.clone() for key, value in model.named_buffers() if key.endswith("running_mean")}
    set_train_mode(model)
    model(torch.randn(4, 3, 32, 32))
    moved = {key for key, value in model.named_buffers() if key in before and not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.startswith("layers.1.")} and len(before) > len(moved) > 0


def test_too_many_frozen_stages():
    with pytest.raises(UserError, match=r"FREEZE_STAGES is 5, but vmamba_nano has a stem and 3 stages: .* 4 at most"):
        freeze(create("vmamba_nano"), config(TRAIN__FREEZE_STAGES=5, MODEL__NAME="vmamba_nano"))
    with pytest.raises(UserError, match="does not tell its stages"):
        freeze(Tiny(), config(TRAIN__FREEZE_STAGES=1))
