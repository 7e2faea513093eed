"""Reading configs: what cannot be read is named, with the reason."""

import pytest

pytest.importorskip("mmengine")
pytestmark = pytest.mark.dense

from ssm_mm.config import read_config  # noqa: E402
from ssm_train.common.errors import UserError  # noqa: E402


def test_imports_that_fail_tell_why(tmp_path):
    path = tmp_path / "some.py"
    path.write_text("custom_imports = dict(imports=['ssm_mm.absent'], allow_failed_imports=False)\n")
    with pytest.raises(UserError) as caught:
        read_config(str(path))
    reason = "Failed to import ssm_mm.absent (No module named 'ssm_mm.absent')"
    assert str(caught.value) == f"config {path} cannot be read: {reason}"
