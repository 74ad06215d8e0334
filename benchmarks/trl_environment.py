"""Virtual environments for TRL, beside our own, made where they are missing: TRL pins what we do not want pinned.

    python benchmarks/trl_environment.py

1.16 has SFT and reward training; 1.12 is the last with PPO. torch is of the version that we have, so that both sides
multiply with the same kernels.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRAINING, PPO = "1.16.0", "1.12.0"


def python_with_trl(release: str) -> Path:
    """The interpreter of an environment with that release of TRL."""
    folder = HERE / f".venv-trl-{release}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        torch = version("torch").split("+")[0]
        print(f"making {folder} with TRL {release} and torch {torch}, once", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        command = [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            f"torch=={torch}",
            f"trl=={release}",
            f"peft=={version('peft')}",
        ]
        subprocess.run([*map(str, command)], check=True)
        done.touch()
    return python


if __name__ == "__main__":
    for each in (TRAINING, PPO):
        print(python_with_trl(each))
