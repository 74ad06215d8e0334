"""What all tests share: no network, no limit of time for an example, one thread each where several run at a time, and
the long ones first.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported; commands inherit it

import pytest
from hypothesis import settings

settings.register_profile("stackllama", deadline=None)
settings.load_profile("stackllama")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups first: one process has to do each, and would be left alone with one that begins last."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
