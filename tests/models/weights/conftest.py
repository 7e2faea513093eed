"""A table with nano models in it, whose addresses are those of a server on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import io
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace

import pytest
import timm
import torch
from yacs.config import CfgNode

import ssm_models  # noqa: F401
from ssm_models.weights import Entry, download, entries, table

from .server import Server

GITHUB = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/"
HUB = "https://huggingface.co/hustvl/Vim-nano/resolve/main/"


def official(name: str, ema: bool = False) -> dict:
    """What the authors' trainers write: weights, averages, optimizer, pickled settings."""
    weights = timm.create_model(name).state_dict()
    if not ema:
        return {"model": weights, "epoch": 299, "config": CfgNode({"MODEL": CfgNode({"NAME": "vssm"})})}
    average = {name: value + 0.01 if value.is_floating_point() else value for name, value in weights.items()}
    moments = {n: {"exp_avg": torch.zeros_like(value), "step": 3} for n, value in enumerate(weights.values())}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3}]}
    settings = argparse.Namespace(model="vim", lr=5e-4)
    return {"model": weights, "model_ema": average, "optimizer": optimizer, "args": settings}


@pytest.fixture(scope="session")
def contents() -> dict[str, dict]:
    """One per family, for ten classes at 32 pixels."""
    return {name: official(name, ema=name != "vmamba_nano") for name in ("vmamba_nano", "vim_nano", "vssd_nano")}


@pytest.fixture(scope="session")
def files(contents) -> dict[str, bytes]:
    """The files of `contents`."""

    def saved(content: dict) -> bytes:
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    return {name: saved(content) for name, content in contents.items()}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """What all downloads of this process reach, with empty caches."""
    with Server() as running:
        monkeypatch.setenv(download.MIRROR_VARIABLE, running.url)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.01)
        # the hub pauses for 23 seconds in all
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        yield running


@pytest.fixture
def publish(server, files, monkeypatch) -> Callable[..., Entry]:
    """publish(model, **fields of the entry): adds a row to the table and its file to the server."""
    rows = dict(entries())

    def add(model: str, content: bytes | None = None, **fields: object) -> Entry:
        hub = model != "vmamba_nano"
        base = entries()["vim_tiny_patch16_224.in1k" if hub else "vmamba_tiny_s1l8.in1k"]
        made = {"name": f"{model}.test", "model": model, "url": (HUB if hub else GITHUB) + f"{model}.pth"}
        row = dataclasses.replace(base, **made | {"sha256": None, "bytes": None, "mirrors": ()} | fields)
        server.offer(row.url, files[model] if content is None else content)
        rows[row.name] = row
        frozen = MappingProxyType(rows)
        monkeypatch.setattr(table, "entries", lambda: frozen)
        return row

    return add
