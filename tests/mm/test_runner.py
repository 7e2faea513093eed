"""ssm_mm.runner: what several processes would do to each other."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine")
pytestmark = pytest.mark.dense

from mmengine.registry import HOOKS  # noqa: E402

import ssm_mm.runner  # noqa: E402, F401  registers


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_writes_the_metrics(rank, tmp_path, monkeypatch):
    monkeypatch.setattr("mmengine.dist.utils.get_rank", lambda group=None: rank)
    hook = HOOKS.build({"type": "LoggerHook"})
    hook.json_log_path = "metrics.json"
    runner = SimpleNamespace(
        log_processor=SimpleNamespace(get_log_after_epoch=lambda *args, **options: ({"mIoU": 50.0}, "")),
        test_dataloader=[],
        logger=SimpleNamespace(info=lambda text: None),
        log_dir=str(tmp_path),
    )
    hook.after_test_epoch(runner)
    written = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert written == ([{"mIoU": 50.0}] if rank == 0 else [])
