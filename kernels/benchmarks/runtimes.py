"""Models in other runtimes: images/s beside eager PyTorch on the CPU, in one round of turns.

    python kernels/benchmarks/runtimes.py --models vmamba_tiny_s1l8 vssd_tiny vim_tiny_patch16_224 --out runtimes.csv

For every model: eager; "prepared" by `ssm_models.for_inference`; "compiled" by torch.compile with frozen weights; and
files of analyze/export.py, which are written to --files where they are not there yet: ONNX Runtime on the portable
form, with our library ("custom"), and with it in int8; OpenVINO on the portable form, if it is installed; AOTInductor.

A row per runtime and batch: the median of the images/s, the slowest and fastest turn (far apart where something else
ran on the machine: measure again), the ratio of the median to eager, the largest difference of a logit from eager, and
from the JSON beside a file the seconds that its export took. Weights, one file for all, and images are random. Rows are
added to those of other models that --out holds. Beside the csv comes its picture.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import onnxruntime
import timm
import torch
import torch._inductor.config as inductor
from cpu_models import cpu_name
from output import panels, write_csv, write_picture
from safetensors.torch import load_file, save_file
from timing import measure
from torch import Tensor, nn

import ssm_models
import ssm_ops.onnxruntime

ROOT = Path(__file__).parents[2]
COLUMNS = (
    *("cpu", "threads", "model", "runtime", "batch", "images_per_second", "slowest", "fastest", "ratio"),
    *("difference", "file_mib", "export_seconds"),
)
# the names of the files, and what analyze/export.py is told beside the model
FILES = {
    "portable.onnx": (),
    "custom.onnx": ("--scan", "custom"),
    "int8.onnx": ("--scan", "custom", "--int8"),
    "aoti.pt2": (),
}
RUNTIMES = ("prepared", "compiled", "portable", "custom", "int8", "openvino", "aoti")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--files", type=Path, default=Path("runs/exports"), help="folder of exports (%(default)s)")
    parser.add_argument("--calibrate", type=Path, help="images for int8, else scikit-learn's digits, which are written")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runtimes.csv"))
    return parser.parse_args(argv)


def weights_of(model: str, args: argparse.Namespace) -> Path:
    """A file of random weights, written if it is not there."""
    path = args.files / f"{model}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        save_file(timm.create_model(model).state_dict(), path)
    return path


def exported(model: str, name: str, args: argparse.Namespace) -> tuple[Path, dict]:
    """A file of a model, written if it is not there, and what stands in the table of it."""
    path = args.files / f"{model}.{name}"
    report = path.with_name(f"{path.name}.json")
    if not report.exists():
        command = [sys.executable, ROOT / "analyze" / "export.py", "--model", model, "--size", str(args.size)]
        command += ["--checkpoint", weights_of(model, args), "--out", path, *FILES[name]]
        subprocess.run([*command, calibration_images(args)] if "--int8" in command else command, check=True)
    seconds = json.loads(report.read_text())["seconds"]
    return path, {"file_mib": round(path.stat().st_size / 2**20, 1), "export_seconds": seconds}


def calibration_images(args: argparse.Namespace) -> Path:
    if args.calibrate is None:
        args.calibrate = args.files / "digits"
        subprocess.run([sys.executable, "-m", "ssm_train.data.digits", "--out", args.calibrate], check=True)
    return args.calibrate


def runs_of(name: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[Tensor], Tensor], dict]]:
    """Runtimes of a model, each with how it runs images and what the table says of its file; eager is the first."""

    def model() -> nn.Module:
        made = timm.create_model(name)
        made.load_state_dict(load_file(weights_of(name, args)))
        return made.eval()

    yield "eager", model(), {}
    if "prepared" in args.runtimes:
        yield "prepared", ssm_models.for_inference(model()), {}
    if "compiled" in args.runtimes:
        compiled = torch.compile(model(), dynamic=False)
        yield "compiled", lambda images: frozen(compiled, images), {}
    for form in ("portable", "custom", "int8"):
        if form in args.runtimes:
            path, about = exported(name, f"{form}.onnx", args)
            yield form, load_onnx(path, args.threads, library=form != "portable"), about
    if "openvino" in args.runtimes and importlib.util.find_spec("openvino") is not None:
        path, about = exported(name, "portable.onnx", args)
        yield "openvino", load_openvino(path, args.threads), about
    if "aoti" in args.runtimes:
        path, about = exported(name, "aoti.pt2", args)
        yield "aoti", torch._inductor.aoti_load_package(str(path)), about


def frozen(compiled: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The weights become constants at the first call."""
    with inductor.patch(freezing=True):
        return compiled(images)


def load_onnx(path: Path, threads: int, library: bool) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        ssm_ops.onnxruntime.register(options)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def load_openvino(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import openvino  # an option of this command, no requirement of the project

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


def measured(name: str, args: argparse.Namespace) -> list[dict]:
    """The rows of a model."""
    runs = list(runs_of(name, args))
    rows = []
    for batch in args.batches:
        images = torch.randn(batch, 3, args.size, args.size)
        with torch.inference_mode(False), torch.no_grad():  # frozen weights of "compiled" want no inference mode
            expected, *others = (run(images).clone() for _, run, _ in runs)
            calls = {runtime: lambda run=run: run(images) for runtime, run, _ in runs}  # noqa: B023  called at once
            times = measure(calls, args.turns, torch.device("cpu"))
        differences = ["", *(f"{(each - expected).abs().max():.1e}" for each in others)]
        for (runtime, _, about), difference in zip(runs, differences, strict=True):
            time = times[runtime]
            row = {"cpu": cpu_name(), "threads": args.threads, "model": name, "runtime": runtime, "batch": batch}
            row |= {"images_per_second": round(batch / time.median, 2)}
            row |= {"slowest": round(batch / time.slowest, 2), "fastest": round(batch / time.fastest, 2)}
            row |= {"ratio": round(times["eager"].median / time.median, 2), "difference": difference} | about
            print(*row.values(), sep="  ", flush=True)
            rows.append(row)
    return rows


def draw(rows: list[dict], out: Path) -> None:
    """A panel per batch: ratios to eager."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, found = panels(len(batches), (9, 0.3 * len(rows) + 1.5 * len(batches)))
    for axes, batch in zip(found, batches, strict=True):
        mine = [row for row in rows if row["batch"] == batch]
        axes.barh([f"{row['model']}  {row['runtime']}" for row in mine], [float(row["ratio"]) for row in mine])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=f"{mine[0]['cpu']}, batch {batch}, threads: {mine[0]['threads']}", xlabel="images/s, eager is 1")
        axes.invert_yaxis()
    write_picture(figure, out)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    if args.out.exists():
        with open(args.out, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["model"] not in args.models]
    for model in args.models:
        rows += measured(model, args)
        write_csv(rows, COLUMNS, args.out)  # what is there stays, should the run be cut short
    draw([{**row, "batch": int(row["batch"])} for row in rows], args.out)
    print(f"wrote {args.out} and its picture")


if __name__ == "__main__":
    main()
