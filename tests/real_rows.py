"Where the benchmark's rows are on this machine, and the mark of tests that need them."

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("JUMPLORA_DATA") or ROOT.parent / "shared" / "data" / "cl_benchmark")
needs_rows = pytest.mark.skipif(
    not (DATA / "tasks.json").is_file(), reason=f"no benchmark rows in {DATA}: set JUMPLORA_DATA"
)
