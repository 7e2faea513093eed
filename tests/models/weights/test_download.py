"""Published files from a server on this machine: cached, checked, and every way in which that can fail."""

import dataclasses
import json
import multiprocessing
import os

import pytest

from ssm_models import CheckpointError
from ssm_models.weights import fetch
from ssm_models.weights.download import cache_folder, cached, sha256_of, verify

MODELS = ("vmamba_nano", "vim_nano")  # from GitHub's releases, from the hub


@pytest.mark.parametrize("model", MODELS)
def test_a_file_comes_once(publish, server, files, model):
    entry = publish(model)
    assert cached(entry) is None
    path = fetch(entry)
    assert path.read_bytes() == files[model] and cached(entry) == path
    asked = sum(server.asked.values())
    assert asked == 1
    assert fetch(entry) == path and sum(server.asked.values()) == asked


@pytest.mark.parametrize("model", MODELS)
def test_another_cache_folder(publish, server, tmp_path, files, model):
    path = fetch(publish(model), tmp_path / "mine")
    assert path.is_relative_to(tmp_path / "mine") and path.read_bytes() == files[model]


@pytest.mark.parametrize("model", MODELS)
def test_a_busy_server_is_asked_again(publish, server, files, model):
    entry = publish(model)
    server.faults[next(path for path in server.files if model in path)] = [503]
    assert fetch(entry).read_bytes() == files[model]


def test_a_cut_line_to_the_hub_is_taken_up_again(publish, server, files):
    entry = publish("vim_nano")
    (path,) = server.files
    server.faults[path] = ["cut"]
    assert fetch(entry).read_bytes() == files["vim_nano"]
    assert server.asked[path] == 2


def test_half_a_file_is_not_loaded(publish, server):
    """torch.hub does not notice a cut line."""
    entry = publish("vmamba_nano")
    server.faults[next(iter(server.files))] = ["cut"]
    with pytest.raises(CheckpointError, match="no whole file of weights.*kept beside it as vmamba_nano.pth.rejected"):
        fetch(entry)
    assert cached(entry) is None
    assert fetch(entry).is_file()


@pytest.mark.parametrize("model", MODELS)
def test_wrong_bytes(publish, server, model):
    entry = publish(model, sha256="0" * 64)
    with pytest.raises(CheckpointError, match=f"has the sha256 .{{16}}..., but 0{{16}}... is published for {model}"):
        fetch(entry)


@pytest.mark.parametrize("model", MODELS)
def test_a_damaged_cache_is_filled_again(publish, server, files, model):
    """What was set aside is not found again, be it through the hub's links."""
    entry = publish(model)
    fetch(entry).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=f"no whole file of weights.*kept beside it as {model}.pth.rejected"):
        fetch(entry)
    lock = next(cache_folder().glob("*.lock.json"))
    assert json.loads(lock.read_text())["bytes"] == len(files[model])
    assert fetch(entry).read_bytes() == files[model]


def test_a_page_instead_of_a_file(publish, server):
    entry = publish("vmamba_nano", content=b"<!DOCTYPE html><html>rate limit</html>" * 100)
    with pytest.raises(CheckpointError, match="no whole file of weights"):
        fetch(entry)


def test_wrong_size(publish, server):
    with pytest.raises(CheckpointError, match="bytes instead of 17"):
        fetch(publish("vmamba_nano", bytes=17))


def test_the_lock_remembers_what_was_seen(publish, server, files):
    entry = publish("vmamba_nano")
    path = fetch(entry)
    lock = path.with_name(f"{path.name}.lock.json")
    assert json.loads(lock.read_text()) == {
        "url": entry.url,
        "sha256": sha256_of(path),
        "bytes": len(files["vmamba_nano"]),
    }
    path.write_bytes(files["vssd_nano"])  # a whole file, and another one
    with pytest.raises(CheckpointError, match=r"has the sha256 .{16}..., but an earlier download had .*delete vmamba"):
        fetch(entry)


@pytest.mark.parametrize("model", MODELS)
def test_gone(publish, server, model):
    entry = publish(model, mirrors=("https://github.com/other/place.pth",))
    server.files.clear()
    with pytest.raises(
        CheckpointError, match=r"is not there \(404\); published mirrors: https://github.com/other"
    ) as e:
        fetch(entry)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("model", MODELS)
def test_no_network(publish, server, monkeypatch, model):
    entry = publish(model)
    monkeypatch.setenv("SSM_MODELS_GITHUB", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    way = "HF_ENDPOINT" if model == "vim_nano" else "SSM_MODELS_GITHUB"
    with pytest.raises(CheckpointError, match=f"http://127.0.0.1:9/.*cannot be reached.*set {way} to a mirror") as e:
        fetch(entry)
    assert "\n" not in str(e.value)


def test_offline(publish, server, monkeypatch):
    entry = publish("vmamba_nano")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set: set SSM_MODELS_GITHUB.* file there: .*nano.pth"):
        fetch(entry)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    path = fetch(entry)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(entry) == path


def test_a_full_disk(publish, server, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssm_models.weights.download.download_url_to_file", full)
    with pytest.raises(CheckpointError, match="^no room left for vmamba_nano.pth in .*free some space"):
        fetch(publish("vmamba_nano"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_cache_that_cannot_be_written(publish, server, tmp_path):
    folder = tmp_path / "shared"
    path = fetch(publish("vmamba_nano"), folder)
    path.with_name(f"{path.name}.lock.json").unlink()
    folder.chmod(0o555)
    assert fetch(publish("vmamba_nano"), folder) == path


def test_two_processes_at_once(publish, server):
    """The second one waits for the first, and finds its file."""
    entry = publish("vmamba_nano")
    (address,) = server.files
    server.faults[address] = ["slow"]
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        first, second = pool.map(fetch, [entry] * 2)
    assert first == second and server.asked[address] == 1


def test_verify_reads_all_again(publish, server):
    entry = publish("vmamba_nano")
    path = fetch(entry)
    true = dataclasses.replace(entry, sha256=sha256_of(path))
    verify(true, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="has the sha256"):
        verify(true, path)
