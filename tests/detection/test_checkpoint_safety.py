"""Of pickled code, a checkpoint of mmengine may hold references to the statistics of its log, and nothing else."""

import os

import pytest
import torch

pytest.importorskip("mmengine")
pytestmark = pytest.mark.dense

from mmengine.logging import HistoryBuffer  # noqa: E402

from ssm_mm.checkpoints import allow_mmengine_checkpoints, read  # noqa: E402
from ssm_train.common.errors import UserError  # noqa: E402


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_the_curves_of_a_log_are_read(tmp_path):
    allow_mmengine_checkpoints()
    log = HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1])
    torch.save({"message_hub": {"loss": log}, "state_dict": {}}, tmp_path / "epoch_1.pth")
    found = read(tmp_path / "epoch_1.pth")["message_hub"]["loss"]
    assert found.mean() == 3.0 and found.statistics("max") == 6.0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda path: Call(os.mkdir, str(path)), "mkdir"),
        (lambda path: Call(getattr, HistoryBuffer, "__init__"), "__init__"),
        (lambda path: Call(getattr, HistoryBuffer, "register_statistics"), "register_statistics"),
    ],
)
def test_other_code_is_refused_and_not_run(call, named, tmp_path):
    allow_mmengine_checkpoints()
    torch.save({"state_dict": {}, "extra": call(tmp_path / "made")}, tmp_path / "epoch_1.pth")
    with pytest.raises(UserError, match=named):
        read(tmp_path / "epoch_1.pth")
    assert not (tmp_path / "made").exists()
