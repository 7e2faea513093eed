"""A file of the size and structure of an official one: weights, averages and two moments of 30 million parameters."""

import json
import subprocess
import sys

import pytest
import timm
import torch

CHILD = """
import json, resource, sys
import timm, torch
import ssm_models
from ssm_models.weights import fetch, find

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

path = sys.argv[1]
timm.create_model("vmamba_nano")  # what the first model of a process needs
before = peak()
model = timm.create_model("vmamba_tiny_s1l8")
report = ssm_models.load_checkpoint(model, path, which="ema")
after = peak()
first = next(iter(model.state_dict().values())).double().sum().item()
own = sum(value.nbytes for value in model.state_dict().values())
print(json.dumps({"grown": after - before, "model": own, "entry": report.entry, "first": first}))
"""


@pytest.mark.full
def test_memory_of_a_file_of_16_bytes_per_parameter(tmp_path):
    """At most the file's size and one model, and 32 MB for all else."""
    path = tmp_path / "full.pth"
    weights = timm.create_model("vmamba_tiny_s1l8").state_dict()
    average = {name: value + 1 if value.is_floating_point() else value for name, value in weights.items()}
    moments = {n: {"exp_avg": v.clone(), "exp_avg_sq": v.clone(), "step": 3} for n, v in enumerate(weights.values())}
    torch.save({"model": weights, "model_ema": average, "optimizer": {"state": moments}}, path)
    size = path.stat().st_size
    assert size > 16 * 30_000_000
    expected = next(iter(average.values())).double().sum().item()
    del weights, average, moments
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["entry"] == "model_ema" and found["first"] == expected
    assert found["grown"] <= size + found["model"] + (32 << 20), found | {"file": size}
