"""A linear classifier and k nearest neighbours on features.

Shapes: n training and m validation images, C channels, K classes.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from analyze import features, inputs
from analyze.cli import OUT
from analyze.figures import check_png, save_figure
from analyze.impl import features as extraction
from analyze.impl.features import MANIFEST, read_features, read_manifest
from analyze.quick import say
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import write_atomic

_QUERIES = 512  # images whose neighbours are looked for at once: (queries, n) similarities are in memory


class Accuracy(NamedTuple):
    """In percent; top5 is top-K where there are fewer classes."""

    top1: float
    top5: float


def accuracy(scores: Tensor, targets: Tensor) -> Accuracy:
    """Of scores (m, K) against targets (m,)."""
    hits = scores.topk(min(5, scores.shape[1])).indices == targets[:, None]
    return Accuracy(100 * hits[:, 0].double().mean().item(), 100 * hits.any(1).double().mean().item())


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """All (*, C) with the mean and standard deviation of `train` per channel taken out; constant channels become 0."""
    mean, std = train.mean(0), train.std(0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)
    return [(x - mean) / std for x in (train, *others)]


def fit_lbfgs(features: Tensor, targets: Tensor, classes: int, l2: float, iterations: int) -> nn.Linear:
    """Multinomial logistic regression by L-BFGS on all of (n, C): the least mean cross entropy + l2/2 |W|^2."""
    classifier = _zeros(features, classes)
    optimizer = torch.optim.LBFGS(
        classifier.parameters(), max_iter=iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(features), targets) + l2 / 2 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return classifier


def fit_sgd(
    features: Tensor, targets: Tensor, classes: int, l2: float, epochs: int, lr: float = 0.1, batch: int = 256
) -> nn.Linear:
    """The same by SGD with momentum 0.9 and a learning rate that falls to 0 along a cosine."""
    classifier = _zeros(features, classes)
    groups = [{"params": [classifier.weight], "weight_decay": l2}, {"params": [classifier.bias]}]
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
    steps = epochs * -(-len(features) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    for _ in inputs.progress(range(epochs), "epochs"):
        for part in torch.randperm(len(features), generator=order).to(features.device).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(classifier(features[part]), targets[part]).backward()
            optimizer.step()
            schedule.step()
    return classifier


def _zeros(features: Tensor, classes: int) -> nn.Linear:
    classifier = nn.Linear(features.shape[1], classes, device=features.device)
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    return classifier


def knn_scores(
    train: Tensor, targets: Tensor, queries: Tensor, classes: int, ks: list[int], temperature: float
) -> dict[int, Tensor]:
    """Votes (m, K) of the k nearest of train (n, C) for every query (m, C), by k.

    As in Caron et al. 2021, "DINO" (https://arxiv.org/abs/2104.14294, appendix F.1, after Wu et al. 2018): neighbours
    by cosine similarity s, each with the weight exp(s / temperature).
    """
    train, votes = F.normalize(train), {k: [] for k in ks}
    for part in inputs.progress(F.normalize(queries).split(_QUERIES), "neighbours"):
        similarity, nearest = (part @ train.T).topk(max(ks))
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # of the nearest 1: exp(1 / 0.01) is no float32
        for k in ks:
            empty = weight.new_zeros(len(part), classes)
            votes[k].append(empty.scatter_add_(1, targets[nearest[:, :k]], weight[:, :k]))
    return {k: torch.cat(parts) for k, parts in votes.items()}


def draw(model: str, solver: str, linear: Accuracy, knn: dict[int, Accuracy], images: int) -> Figure:
    """Accuracies of k-NN over k beside the linear classifier's, each +- the standard error of a share of `images`."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.subplots()
    shares = [found.top1 for found in knn.values()]
    errors = [_standard_error(share, images) for share in shares]
    axes.errorbar(
        list(knn), shares, errors, fmt="o-", capsize=3, elinewidth=1, color="C0", label="k nearest neighbours"
    )
    axes.axhline(linear.top1, color="C1", linestyle="--", label=f"linear ({solver}), {linear.top1:.2f} %")
    error = _standard_error(linear.top1, images)
    axes.axhspan(linear.top1 - error, linear.top1 + error, color="C1", alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(list(knn), [str(k) for k in knn])
    axes.minorticks_off()
    axes.set_xlabel("k, neighbours")
    axes.set_ylabel(f"top-1 accuracy on {images} images, %")
    axes.set_title(f"Features of {model} (± standard error)", fontsize=10)
    axes.margins(y=0.35)  # no drama about a tenth of a percent
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _standard_error(percent: float, images: int) -> float:
    return (percent * (100 - percent) / images) ** 0.5


def _quick_features(device: str) -> Path:
    """Where features.py writes without options, after its work if need be."""
    folder = OUT / "features"
    if not (folder / MANIFEST).is_file():
        extraction.command(features.parser().parse_args(["--device", device]))
    say(f"taking --features {folder}")
    return folder


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    if args.features is None:
        args.features = _quick_features(args.device)
    out = args.out or args.features / "probe.png"
    check_png(out)
    if not args.temperature > 0 or args.l2 < 0 or args.epochs < 1:
        raise UserError(
            f"--temperature {args.temperature:g} and --epochs {args.epochs} must be above 0, --l2 {args.l2:g} not below"
        )
    device = inputs.find_device(args.device)
    manifest = read_manifest(args.features)
    (train, train_targets), (val, val_targets) = (
        (x.to(device) for x in read_features(args.features, split)) for split in ("train", "val")
    )
    ks = sorted(set(args.k))
    if ks[0] < 1 or ks[-1] > len(train):
        raise UserError(f"--k {' '.join(map(str, args.k))}: from 1 to {len(train)}, the training images")
    classes = len(manifest["classes"])
    fit = {"lbfgs": fit_lbfgs, "sgd": fit_sgd}[args.solver]
    scaled, scaled_val = standardise(train, val)
    classifier = fit(scaled, train_targets, classes, args.l2, args.epochs)
    with torch.no_grad():
        linear, fitted = (accuracy(classifier(x), y) for x, y in ((scaled_val, val_targets), (scaled, train_targets)))
    votes = knn_scores(train, train_targets, val, classes, ks, args.temperature)
    knn = {k: accuracy(scores, val_targets) for k, scores in votes.items()}
    content = {"model": manifest["model"], "train images": len(train), "val images": len(val)}
    content["linear"] = {"solver": args.solver, "l2": args.l2, **linear._asdict(), "top1 on train": fitted.top1}
    content["knn"] = {"temperature": args.temperature} | {str(k): found._asdict() for k, found in knn.items()}
    inputs.make_folder(out.parent)
    table = out.with_suffix(".json")
    write_atomic(table, json.dumps(content, indent=1) + "\n")
    save_figure(draw(manifest["model"], args.solver, linear, knn, len(val)), out)
    best = max(knn, key=lambda k: knn[k].top1)
    print(f"linear {linear.top1:.2f} %, nearest neighbours {knn[best].top1:.2f} % (k = {best})", out, table, sep="\n")
