"""What all tests share: no network, and the folder of real dumps where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def dumps() -> Path:
    """The folder of real Stack Exchange dumps; the test is skipped where there is none."""
    places = [ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]
    if "STACKLLAMA_DUMPS" in os.environ:
        places.insert(0, Path(os.environ["STACKLLAMA_DUMPS"]))
    for place in places:
        if (place / "expected.json").is_file():
            return place
    pytest.skip(f"no real dumps in {' or '.join(map(str, places))}; set STACKLLAMA_DUMPS to their folder")
