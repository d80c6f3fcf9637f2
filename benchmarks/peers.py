"""The environment of the programs that the races run against: made when missing, apart from the project's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _folder() -> Path:
    return Path(os.environ.get("ABF_PEERS") or ROOT / ".peers").absolute()


def installed() -> Path | None:
    """The peers' Python where their environment is whole, else None; makes nothing."""
    return _folder() / "bin" / "python" if (_folder() / ".installed").is_file() else None


def peer_python() -> Path:
    """The peers' Python: ``$ABF_PEERS`` or ``.peers`` beside the project, with what ``benchmarks/peers.txt`` pins."""
    folder = _folder()
    python = folder / "bin" / "python"
    if not installed():
        print(f"installing the peers into {folder} (once; about 2 GB)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        wanted = (ROOT / "benchmarks" / "peers.txt").read_text().split()
        # torch alone and first: another package's range would pull a larger build
        for words in ([w for w in wanted if w.startswith("torch==")], [w for w in wanted if not w.startswith("torch==")]):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *words], check=True)
        # last: an installation that was cut off is done again
        (folder / ".installed").touch()
    return python
