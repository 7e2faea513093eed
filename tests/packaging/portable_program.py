"""What test_other_systems.py has done under other_system.py, in an empty folder: `import PACKAGE ...` imports all their
modules; `use WORKERS` runs a model, writes the digits, trains on them with that many workers, tells what it knows of
the system, and locks a folder."""

import importlib.util
import shutil
import signal
import sys
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).parents[2]
OPTIONAL = {"triton", "gradio"}


def import_all(package: str) -> None:
    root = Path(importlib.util.find_spec(package).origin).parent
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] not in OPTIONAL:
                raise
        else:
            print("imported", name)


def run_model() -> None:
    import ssm_models

    torch.manual_seed(0)
    model, images = timm.create_model("vmamba_nano").eval(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        print("logits", tuple(model(images).shape), tuple(ssm_models.for_inference(model)(images).shape))


def train(workers: str) -> None:
    from ssm_train.cli import main
    from ssm_train.data.digits import main as write_digits

    assert write_digits(["--out", "digits"]) == 0 and write_digits(["--out", "digits"]) == 0
    for split, count in (("train", 12), ("val", 4)):
        for label in ("3", "8"):
            target = Path("few", split, label)
            target.mkdir(parents=True)
            for path in sorted(Path("digits", split, label).iterdir())[:count]:
                shutil.copy(path, target)
    config = str(ROOT / "configs/classification/vmamba/vmamba_nano_digits.yaml")
    options = ["--cfg", config, "--data-path", "few", "--output", "run", "--batch-size", "8"]
    common = ["TRAIN.WARMUP_EPOCHS", "0", "DATA.NUM_WORKERS", workers]
    for epochs, how in (("1", []), ("2", ["--resume", "auto", "--allow-changes"]), ("1", ["--fresh"])):
        status = main([*options, *how, "--opts", "TRAIN.EPOCHS", epochs, *common])
        print("trained", epochs, status)
    print("evaluated", main([*options, "--eval", "--pretrained", "run", "--opts", *common]))


def tell_limits() -> None:
    from ssm_train.common.machine import memory_bytes, peak_memory_mb
    from ssm_train.common.preemption import StopRequest

    cpu = torch.device("cpu")
    print("memory", memory_bytes(cpu), "peak", peak_memory_mb(cpu))
    with (stop := StopRequest()).listening():
        signal.raise_signal(signal.SIGTERM)
        print("asked to stop by", stop.signal)


def lock() -> None:
    from ssm_train.common.errors import UserError
    from ssm_train.common.fileio import folder_lock

    with folder_lock(Path("mine")) as held:
        try:
            with folder_lock(Path("mine")):
                print("locked twice")
        except UserError as error:
            print(error)
        print("holds", held.holds())


if sys.argv[1] == "import":
    for package in sys.argv[2:]:
        import_all(package)
else:
    run_model()
    train(sys.argv[2])
    tell_limits()
    lock()
