"The notebooks, the package and the README must say the same thing."

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NBS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the sources, exported and cleaned again from the notebooks alone."
    to = tmp_path_factory.mktemp("repo") / "jumplora"
    to.mkdir()
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, to)
    for name in ("nbs", "jumplora"):
        shutil.copytree(
            ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    for p in (to / "jumplora").rglob("*.py"):
        if p.name != "__init__.py":
            p.unlink()  # a module whose notebook is gone must not survive
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"HOME": str(to.parent)}
    for command in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([BIN / command], cwd=to, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return to


def modules(root):
    return sorted(p.relative_to(root) for p in (root / "jumplora").rglob("*.py"))


def test_package_is_what_the_notebooks_export(copy):
    assert modules(ROOT) == modules(copy)
    differ = [str(p) for p in modules(copy) if not filecmp.cmp(ROOT / p, copy / p, shallow=False)]
    assert not differ, f"run `make export`: {differ}"


@pytest.mark.parametrize("nb", NBS, ids=lambda p: p.name)
def test_notebook_is_clean(copy, nb):
    assert (copy / nb.relative_to(ROOT)).read_text() == nb.read_text(), "run `nbdev_clean`"


@pytest.mark.parametrize("nb", NBS, ids=lambda p: p.name)
def test_notebook_has_unique_cell_ids_and_no_merge_conflict(nb):
    cells = json.loads(nb.read_text())["cells"]
    assert len({c["id"] for c in cells}) == len(cells)
    assert not [c["id"] for c in cells if "<<<<<<<" in "".join(c["source"])]


def test_readme_is_what_the_index_says():
    command = [sys.executable, ROOT / "docs" / "nbtool.py", "readme", "--stdout"]
    after = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert after == (ROOT / "README.md").read_text(encoding="utf-8"), "run `make readme`"


def test_every_link_of_the_readme_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    links = [link for link in links if "://" not in link]
    assert len(links) > 30 and [link for link in links if not (ROOT / link).exists()] == []


def test_version_is_the_same_everywhere():
    import jumplora

    settings = dict(o.split(" = ", 1) for o in (ROOT / "settings.ini").read_text().splitlines() if " = " in o)
    citation = (ROOT / "CITATION.cff").read_text()
    assert jumplora.__version__ == settings["version"]
    assert f"\nversion: {settings['version']}\n" in citation


def test_the_lock_has_one_exact_version_of_every_requirement():
    import shlex

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [o for o in (ROOT / "requirements.txt").read_text().splitlines() if o and not o.startswith("#")]
    lock = dict(o.split("==") for o in lines)  # every line is name==version
    names = {canonicalize_name(n): v for n, v in lock.items()}
    assert len(names) == len(lines)
    settings = dict(o.split(" = ", 1) for o in (ROOT / "settings.ini").read_text().splitlines() if " = " in o)
    for wanted in shlex.split(settings["requirements"] + " " + settings["dev_requirements"]):
        wanted = Requirement(wanted)
        assert wanted.specifier.contains(names[canonicalize_name(wanted.name)]), wanted
    assert not [n for n in names if n.startswith(("nvidia-", "cuda-", "triton"))], "torch brings these itself"
    assert "+" not in names["torch"], "a local build's version cannot be installed elsewhere"


def test_every_mutation_of_the_table_still_fits_the_code_and_was_noticed():
    import mutations

    mutations.check_table()
    record = json.loads(mutations.STORED.read_text("utf-8"))
    assert {m.name: (m.module, m.old, m.new) for m in mutations.MUTATIONS} == {
        name: (found["module"], found["old"], found["new"]) for name, found in record["mutations"].items()
    }
    assert record["counts"] == {"killed": len(mutations.MUTATIONS)}
    for name, found in record["mutations"].items():
        file, _, test = found["by"].partition("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text("utf-8"), f"{name}: run make mutations"
