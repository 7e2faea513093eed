"""The problems of the self-check through the Triton kernels, which test_self_check.py runs under the interpreter."""

import pytest
import torch

from ssm_ops import _self_check
from ssm_ops._library import OPERATORS

OPERATORS_IN_TRITON = [name for name, operator in OPERATORS.items() if operator.find("triton")]


@pytest.mark.parametrize("name", OPERATORS_IN_TRITON)
def test_self_check(name, monkeypatch):
    """In one dtype, for the interpreter is slow; the other files of cases have all of them."""
    monkeypatch.setattr(_self_check, "DTYPES", (torch.bfloat16,))
    assert _self_check.fault(name, "triton", "cpu") is None
