"What every test shares: no model hub, no window, one thread, the repository's folder and its notebooks."

import os
import subprocess
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", MPLBACKEND="agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks otherwise

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    "The folder of the repository."
    return ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The built site: the one in docs/_build/html if it is newer than its sources, else built now."
    html = ROOT / "docs" / "_build" / "html"
    sources = [
        *(ROOT / "nbs").rglob("*.ipynb"),
        *(ROOT / "docs").glob("*.*"),
        *(ROOT / "docs/_static").glob("*"),
    ]
    built = html / "searchindex.js"  # Sphinx writes it last
    if not built.exists() or built.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        bin = Path(sys.executable).parent
        tool = ROOT / "docs" / "nbtool.py"
        build = "-q -W --keep-going -b html -c docs -d docs/_build/doctrees docs/_build/src docs/_build/html"
        for command in ([sys.executable, tool, "stage"], [bin / "sphinx-build", *build.split()]):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return html
