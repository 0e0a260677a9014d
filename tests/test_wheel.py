"The wheel as a user gets it: what is in it, and the README's example in an environment of its own."

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(*command, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel, built from a copy of the sources."
    copy, to = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in "settings.ini setup.py pyproject.toml MANIFEST.in LICENSE README.md CITATION.cff".split():
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "jumplora", copy / "jumplora", ignore=shutil.ignore_patterns("__pycache__"))
    run(*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", to, copy)
    return next(to.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of an environment that has jumplora from the wheel and nothing else of its own.

    What jumplora requires is read from the environment that runs this test, through a path in a .pth file:
    its own .pth files, and with them the editable jumplora, are not read.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(*PIP, "--python", python, "install", "-q", "--no-deps", wheel)
    folder = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(folder, "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_the_modules_and_the_facts_of_the_benchmark_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "jumplora").rglob("*.py")}
    facts = {"jumplora/data/benchmark.json", "jumplora/py.typed"}
    assert {n for n in names if ".dist-info/" not in n} == modules | facts
    assert any(n.endswith("LICENSE") for n in names)


def test_the_wheel_says_what_it_needs_and_under_which_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    info = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    info = email.message_from_string(info)
    needs = [r for r in info.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.match(r"[\w-]+", r)[0] for r in needs} >= {
        "torch",
        "transformers",
        "peft",
        "datasets",
        "accelerate",
    }
    assert not [r for r in needs if re.match(r"nbdev|fastcore|jupyter|pytest|sphinx", r)]
    assert info["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (info["License-Expression"] or info["License"])
    assert "jumplora" in info.get_payload()


def example() -> str:
    "The README's block that learns a sequence; its imports may stand in a block before it."
    blocks = re.findall(r"^``` ?python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    found = [i for i, b in enumerate(blocks) if "learn_sequence(" in b]
    assert found, "README.md has no Python block that calls learn_sequence"
    before = [b for b in blocks[: found[0]] if b.startswith("from jumplora import")]
    return "".join([*before, blocks[found[0]]])


SMALL = """
from jumplora import Task, TaskSequence
from jumplora.learning.tasks import Example
def task(name, yes, no):
    rows = tuple(Example(f"{name} {i} {word}", word) for i in range(4) for word in (yes, no))
    return Task(name, "Which word is in the text?", (yes, no), rows, rows[:2], rows[:4])
sequence = TaskSequence("small", (task("first", "good", "bad"), task("second", "war", "peace")))
"""


def test_the_readme_example_runs_in_a_fresh_environment(python, tmp_path):
    code = example()
    model, sequence = '"smollm2-135m"', 'load_sequence("newsroom")'
    assert model in code and sequence in code, "the example has changed: change the two substitutions below"
    lines = code.replace(model, '"tiny-llama"').replace(sequence, "sequence").splitlines()
    values = [o.partition("#")[0].strip() for o in lines if o.startswith("run.")]
    assert values, "the example ends in the values to look at"
    block = "import sys; sys.modules.update(dict.fromkeys(['nbdev', 'fastcore', 'execnb']))"
    program = tmp_path / "example.py"
    checks = [
        "import jumplora, math, numpy as np",
        f"values = [{', '.join(f'({v})' for v in values)}]",
        "assert np.shape(run.accuracy) == (2, 2), run.accuracy",
        "assert 0 <= run.average_accuracy <= 100 and math.isfinite(run.backward_transfer)",
        "assert 0 <= run.mean_sparsity <= 100",
        "print(jumplora.__file__)",
    ]
    program.write_text("\n".join([block, SMALL, *lines, *checks]), encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {
        "HOME": str(tmp_path),
        "JUMPLORA_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    where = run(python, program, cwd=tmp_path, env=env, timeout=600).splitlines()[-1]
    assert Path(where).is_relative_to(python.parent.parent), f"{where} is not the wheel's"


def test_the_command_is_installed_and_explains_itself(python, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    said = run(python.parent / "jumplora", "--help", cwd=tmp_path, env=env)
    assert "compare" in said
