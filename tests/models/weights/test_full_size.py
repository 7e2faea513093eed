"""A file of the size and structure of an official one: weights, averages and two moments of 30 million parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from ssm_models.weights import download, find

from .server import Server

CHILD = """
import json, resource, sys
import timm, torch
import ssm_models

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

timm.create_model("vmamba_nano")  # what the first model of a process needs
before = peak()
{load}
after = peak()
first = next(iter(model.state_dict().values())).double().sum().item()
own = sum(value.nbytes for value in model.state_dict().values())
print(json.dumps({{"grown": after - before, "model": own, "first": first}}))
"""
BY_PATH = """
model = timm.create_model("vmamba_tiny_s1l8")
assert ssm_models.load_checkpoint(model, sys.argv[1], which="ema").entry == "model_ema"
"""
BY_NAME = 'model = timm.create_model("vmamba_tiny_s1l8.in1k", pretrained=True)'

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """The file, and the sum of the first tensor of each of its two sets."""
    path = tmp_path_factory.mktemp("official") / "full.pth"
    weights = timm.create_model("vmamba_tiny_s1l8").state_dict()
    average = {name: value + 1 if value.is_floating_point() else value for name, value in weights.items()}
    moments = {n: {"exp_avg": v.clone(), "exp_avg_sq": v.clone(), "step": 3} for n, v in enumerate(weights.values())}
    torch.save({"model": weights, "model_ema": average, "optimizer": {"state": moments}}, path)
    assert path.stat().st_size > 16 * 30_000_000
    sets = {"model": weights, "ema": average}
    return path, {which: next(iter(held.values())).double().sum().item() for which, held in sets.items()}


def loaded(load: str, *arguments: str, **environment: str) -> dict:
    """What a process of its own says of the model that `load` makes."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(load=load), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_memory_of_a_file_of_16_bytes_per_parameter(official):
    """At most the file's size and one model, and 32 MB for all else."""
    path, first = official
    found = loaded(BY_PATH, str(path))
    assert found["first"] == first["ema"]
    assert found["grown"] <= path.stat().st_size + found["model"] + (32 << 20), found


def test_a_published_name_through_the_server(official, tmp_path):
    """Downloaded once, with the set that the table names, and from the cache in the same memory as by its path."""
    path, first = official
    entry = find("vmamba_tiny_s1l8.in1k")
    with Server() as server:
        asked = server.offer(entry.url, path.read_bytes())
        environment = {download.MIRROR_VARIABLE: server.url, "TORCH_HOME": str(tmp_path)}
        downloaded = loaded(BY_NAME, **environment)
        cached = loaded(BY_NAME, **environment)
        assert server.asked == {asked: 1} and server.sent[asked] == path.stat().st_size
    assert downloaded["first"] == cached["first"] == first[entry.entry]
    assert cached["grown"] <= path.stat().st_size + cached["model"] + (32 << 20), cached
