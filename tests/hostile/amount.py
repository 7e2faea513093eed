"""How many files the fuzzers try: few by default, more with --all, and as many as SSM_FUZZ_FILES says by hand:

SSM_FUZZ_FILES=20000 pytest tests/models/test_hostile_files.py tests/hostile -k "random or fuzz"
"""

import os

import pytest


def amounts(few: int, many: int) -> list:
    """For `parametrize`."""
    return [int(os.environ.get("SSM_FUZZ_FILES", few)), pytest.param(many, marks=pytest.mark.full)]
