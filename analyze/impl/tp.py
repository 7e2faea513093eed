"""Throughput and peak memory of models: what is measured, and the lines of the csv."""

import argparse
import itertools
from collections.abc import Callable, Iterable
from functools import cache

import timm
import torch
from torch import nn

from analyze.figures import check_png, save_figure
from analyze.inputs import at_least, device_name, find_device, progress_bar
from analyze.tables import write_csv
from analyze.throughput import Result, Variant, measure
from analyze.throughput_figure import draw
from ssm_train.common.errors import UserError
from ssm_train.step.model import check_model_name

SETS = {
    "nano": "vmamba_nano vim_nano vssd_nano",
    "tiny": "vmamba_tiny_s1l8 vssd_tiny vim_tiny_patch16_224 "
    "swin_tiny_patch4_window7_224 convnext_tiny deit_tiny_patch16_224",
    "small": "vmamba_small_s1l20 vssd_small vim_small_patch16_224 "
    "swin_small_patch4_window7_224 convnext_small deit_small_patch16_224",
    "base": "vmamba_base_s1l20 vssd_base vim_base_patch16_224 "
    "swin_base_patch4_window7_224 convnext_base deit_base_patch16_224",
}

# ---- what to measure -------------------------------------------------------------------------------------------------


def named_models(names: Iterable[str]) -> list[str]:
    """`names` with sets replaced by their models. UserError for an unknown one."""
    found = list(dict.fromkeys(itertools.chain.from_iterable(SETS.get(name, name).split() for name in names)))
    for name in found:
        check_model_name(name, "--model")
    return found


def builder(device: torch.device) -> Callable[[Variant], nn.Module]:
    """Builds every model once, or once for every size where it is made for one; without stochastic depth."""

    @cache
    def create(name: str, size: int | None) -> nn.Module:
        fixed = {} if size is None else {"img_size": size}
        try:
            return timm.create_model(name, drop_path_rate=0.0, **fixed).to(device)
        except TypeError as error:
            raise UserError(f"model {name} cannot be built as needed here: {error}") from error

    def build(variant: Variant) -> nn.Module:
        settings = timm.get_pretrained_cfg(variant.model)
        rebuilt = settings.fixed_input_size and variant.size != settings.input_size[-1]
        return create(variant.model, variant.size if rebuilt else None)

    return build


# ---- results ---------------------------------------------------------------------------------------------------------

COLUMNS = (
    "model",
    "mode",
    "size",
    "batch",
    "precision",
    "compiled",
    "images_per_second",
    "slowest",
    "fastest",
    "rounds",
    "peak_mib",
    "status",
    "device",
)


def table(results: Iterable[Result], device: str) -> list[tuple[object, ...]]:
    """The lines of the csv, with the cells of COLUMNS; what was not measured is left blank."""
    rows = []
    for result in results:
        v, speed = result.variant, result.images_per_second
        spread = (min(result.samples), max(result.samples)) if speed is not None else (None, None)
        done = len(result.samples)
        cells = (v.model, v.mode, v.size, v.batch, v.precision, v.compiled, speed, *spread, done, result.peak_mib)
        rows.append((*cells, result.status, device))
    return rows


def _print(results: Iterable[Result]) -> None:
    for result in results:
        v = result.variant
        how = f"{v.model:30} {v.mode:9} {v.size:5} px  batch {v.batch} {v.precision}{' compiled' * v.compiled}"
        if result.images_per_second is None:
            print(f"{how}  {result.status}")
        else:
            spread = f"({min(result.samples):.1f}..{max(result.samples):.1f})"
            print(f"{how}  {result.images_per_second:9.1f} images/s {spread}  {result.peak_mib:.0f} MiB")


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    at_least(1, size=args.size, batch=args.batch, rounds=args.rounds)
    at_least(0, seconds=args.seconds)
    check_png(args.out)
    device, path = find_device(args.device), args.out.with_suffix(".csv")
    name = device_name(device)
    compiled = [choice == "yes" for choice in args.compile]
    choices = itertools.product(args.modes, args.precisions, compiled, args.size, named_models(args.model))
    variants = [Variant(model, size, args.batch, mode, p, c) for mode, p, c, size, model in choices]
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(variants) * (1 + args.rounds))

        def changed(results: list[Result]) -> None:
            write_csv(path, COLUMNS, table(results, name))
            progress.update(task, completed=sum(result.turns_over(args.rounds) for result in results))

        torch.manual_seed(0)
        results = measure(variants, builder(device), device, rounds=args.rounds, seconds=args.seconds, changed=changed)
    _print(results)
    save_figure(draw(results, name), args.out)
    print(args.out, path, sep="\n")
