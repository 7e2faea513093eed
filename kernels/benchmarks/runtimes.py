"""Models in other runtimes: images/s beside eager PyTorch, taking turns on the CPU, on files of analyze/export.py.

    python analyze/export.py --model vim_tiny_patch16_224 --scan custom --out FOLDER/custom.onnx
    python kernels/benchmarks/runtimes.py --model vim_tiny_patch16_224 --files FOLDER/*.onnx --out runtimes.csv

A row per runtime and batch: the median of the images/s, the slowest and fastest turn (far apart where something else
ran on the machine: measure again), the ratio of the median to eager, and from the JSON beside a file the largest
difference of a logit and the seconds that its export took. The numbers in an image and in the weights do not matter
here. --openvino runs every ONNX file that needs no library in OpenVINO, too; --compiled adds `torch.compile`. Rows are
added to those of other models that --out holds. Beside the csv comes a PNG.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import timm
import torch
from output import panels, write_csv, write_png
from timing import measure

import ssm_models  # noqa: F401  registers its models in timm
import ssm_ops.onnxruntime

COLUMNS = (
    "model",
    "runtime",
    "batch",
    "threads",
    "images_per_second",
    "slowest",
    "fastest",
    "ratio",
    "difference",
    "file_mib",
    "export_seconds",
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--files", type=Path, nargs="*", default=[], help=".onnx and .aoti.pt2, of this model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runtimes.csv"))
    return parser.parse_args(argv)


def load(path: Path, threads: int) -> Callable[[torch.Tensor], object]:
    """An exported file as a function of images."""
    if path.name.endswith(".aoti.pt2"):
        return torch._inductor.aoti_load_package(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if needs_library(path):
        ssm_ops.onnxruntime.register(options)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def needs_library(path: Path) -> bool:
    return any(entry.domain == ssm_ops.onnxruntime.DOMAIN for entry in onnx.load(path).opset_import)


def load_openvino(path: Path, threads: int) -> Callable[[torch.Tensor], object]:
    import openvino  # an option of this command, no requirement of the project

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda images: compiled(images.numpy())


def draw(rows: list[dict], out: Path) -> None:
    """A panel per batch: ratios to eager."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, found = panels(len(batches), (9, 0.35 * len(rows) + 1.5 * len(batches)))
    for axes, batch in zip(found, batches, strict=True):
        mine = [row for row in rows if row["batch"] == batch]
        axes.barh([f"{row['model']}  {row['runtime']}" for row in mine], [float(row["ratio"]) for row in mine])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=f"batch {batch}, {mine[0]['threads']} threads", xlabel="images/s, eager is 1")
        axes.invert_yaxis()
    write_png(figure, out)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    model = timm.create_model(args.model).eval()
    runs = {"eager": model}
    if args.compiled:
        runs["compiled"] = torch.compile(model, dynamic=False)
    about = {}
    for path in args.files:
        name = path.name.removesuffix(".onnx").removesuffix(".pt2")
        report = path.with_name(f"{path.name}.json")
        said = json.loads(report.read_text())
        worst = max(difference["largest"] for difference in said["differences"])
        about[name] = {"difference": f"{worst:.1e}", "file_mib": round(path.stat().st_size / 2**20, 1)}
        about[name]["export_seconds"] = said["seconds"]
        runs[name] = load(path, args.threads)
        if args.openvino and path.suffix == ".onnx" and not needs_library(path):
            about[f"{name}, openvino"] = about[name]
            runs[f"{name}, openvino"] = load_openvino(path, args.threads)
    rows = []
    for batch in args.batches:
        images = torch.randn(batch, 3, args.size, args.size)
        with torch.inference_mode():
            calls = {name: lambda run=run: run(images) for name, run in runs.items()}  # noqa: B023  called at once
            times = measure(calls, args.turns, torch.device("cpu"))
        for name, time in times.items():
            row = {"model": args.model, "runtime": name, "batch": batch, "threads": args.threads}
            row |= {"images_per_second": round(batch / time.median, 2)}
            row |= {"slowest": round(batch / time.slowest, 2), "fastest": round(batch / time.fastest, 2)}
            row |= {"ratio": round(times["eager"].median / time.median, 2)} | about.get(name, {})
            print(*row.values(), sep="  ")
            rows.append(row)
    if args.out.exists():
        with open(args.out, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["model"] != args.model] + rows
    write_csv(rows, COLUMNS, args.out)
    draw([{**row, "batch": int(row["batch"])} for row in rows], args.out)
    print(f"wrote {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
