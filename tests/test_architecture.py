"How the package hangs together: imports run one way, nothing heavy or unsafe, every public name explained."

import ast
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import jumplora

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jumplora"
NBS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

# The order of imports, declared once: a module imports from the lines above its own, and from no other.
# The order of reading is another one, and stands in the index.
LAYERS = """
conventions
method.jumprelu data.files
method.gated_linear
method.adapter method.regularizers
method.schedule
learning.tasks running.processes
data.benchmark running.answers
data.sequences learning.evaluation
data.backbones storage.record
storage.state running.trunk
storage.updates
learning.training
running.tracking learning.dry_check
learning.continual
learning.methods
results.run_tables storage.rollback
results.sparsity results.speed storage.export
running.grid
running.reproduce
results.interference
command_line
"""
LAYER = {module: i for i, line in enumerate(LAYERS.split("\n")) for module in line.split()}
MODULES = sorted(LAYER)


def code_of(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "code")


def file_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def imported(source: str, module: str = "") -> set[str]:
    "The modules of the package that the source of a module, or of a page, imports, wherever in it."
    lines = [o for o in source.splitlines() if not o.lstrip().startswith(("%", "!"))]
    parts, names = ["jumplora", *module.split(".")], set()
    for o in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(o, ast.ImportFrom):
            base = ".".join([*(parts[: -o.level] if o.level else ()), *([o.module] if o.module else ())])
            for alias in o.names:  # from a module, of a module, or a name that the package loads from one
                owner = jumplora._NAMES.get(alias.name, "") if base == "jumplora" else ""
                names |= {base, f"{base}.{alias.name}", f"jumplora.{owner}"}
        elif isinstance(o, ast.Import):
            names |= {a.name for a in o.names}
    return {n.removeprefix("jumplora.") for n in names} & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_below_its_own(module):
    found = imported(file_of(module).read_text(encoding="utf-8"), module) - {module}
    upward = sorted(m for m in found if LAYER[m] >= LAYER[module])
    assert not upward, f"jumplora.{module} imports from {upward}"


def test_imports_are_found_in_every_form():
    forms = """
from ..method.jumprelu import x
from . import record
def f():
    from jumplora.results import speed
    import jumplora.running.grid
    from jumplora import learn_sequence
"""
    found = imported(forms, "storage.updates")
    wanted = {"method.jumprelu", "storage.record", "results.speed", "running.grid", "learning.continual"}
    assert found == wanted


def test_every_page_has_a_name_of_its_own():
    # links to names of the package, and downloads, know a page by its name alone
    names = [p.stem for p in NBS]
    assert len(names) == len(set(names))


def test_importing_the_package_loads_nothing_heavy():
    heavy = set("torch transformers peft datasets pandas matplotlib numpy".split())
    code = f"import sys, jumplora; dir(jumplora); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")


def test_every_module_is_exported_by_the_page_of_its_name_and_has_its_layer():
    files = [p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")]
    exported = re.findall(r"^#\|\s*default_exp\s+([\w.]+)", "\n".join(map(code_of, NBS)), re.M)
    assert {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in files} == set(MODULES)
    assert sorted(exported) == MODULES
    assert {m.split(".")[-1] for m in MODULES} <= {p.stem for p in NBS}


def test_a_public_name_is_never_the_name_of_a_module():
    # else `from jumplora import x` would give the function or the module, whichever was loaded first
    assert not set(jumplora._NAMES) & {part for m in MODULES for part in m.split(".")[:1]}


@pytest.mark.parametrize("name", jumplora._NAMES)
def test_a_public_name_loads_from_its_module(name):
    value = getattr(jumplora, name)
    module = __import__(f"jumplora.{jumplora._NAMES[name]}", fromlist=[name])
    assert value is getattr(module, name)
    assert name in module.__all__, f"{name} is not exported by its notebook"
    assert getattr(value, "__module__", module.__name__) in (
        module.__name__,
        "builtins",
        "collections.abc",
        "typing",
    )


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(
        AttributeError, match="has no attribute 'learn_sequences'; did you mean 'learn_sequence'"
    ):
        jumplora.learn_sequences  # noqa: B018


UNSAFE = {
    "pickle": "records and checkpoints are JSON and safetensors",
    "cloudpickle": "records and checkpoints are JSON and safetensors",
    "dill": "records and checkpoints are JSON and safetensors",
    "joblib": "records and checkpoints are JSON and safetensors",
    "shelve": "records and checkpoints are JSON and safetensors",
    "marshal": "records and checkpoints are JSON and safetensors",
}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_unpickles_nothing_and_runs_no_foreign_code(module):
    tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
    for o in ast.walk(tree):
        if isinstance(o, (ast.Import, ast.ImportFrom)):
            names = {a.name for a in o.names} | {getattr(o, "module", None)}
            assert not names & UNSAFE.keys(), f"{ast.unparse(o)}: {UNSAFE[(names & UNSAFE.keys()).pop()]}"
        if isinstance(o, ast.Call):
            call = ast.unparse(o.func)
            assert call not in ("torch.load", "torch.save", "eval", "exec", "os.system"), ast.unparse(o)
            for k in o.keywords:
                true = isinstance(k.value, ast.Constant) and k.value.value is True
                assert not (k.arg in ("trust_remote_code", "allow_pickle", "shell") and true), ast.unparse(o)
        if isinstance(o, (ast.FunctionDef, ast.Lambda)):
            a = o.args
            pairs = [*zip(reversed(a.posonlyargs + a.args), reversed(a.defaults), strict=False)]
            pairs += zip(a.kwonlyargs, a.kw_defaults, strict=True)
            for p, d in pairs:
                true = isinstance(d, ast.Constant) and d.value is True
                assert not (p.arg == "trust_remote_code" and true), f"{module}: {p.arg} is on by default"


def functions_and_classes(module: str) -> list[ast.stmt]:
    "The functions and classes of a module whose names do not begin with an underscore."
    tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [o for o in tree.body if isinstance(o, kinds) and not o.name.startswith("_")]


@pytest.mark.parametrize("module", MODULES)
def test_every_name_without_an_underscore_has_a_docstring(module):
    bare = [o.name for o in functions_and_classes(module) if not ast.get_docstring(o)]
    assert not bare, f"no docstring in jumplora.{module}: {bare}"


@pytest.mark.parametrize("module", MODULES)
def test_every_parameter_and_return_of_a_public_name_is_explained_on_its_line(module):
    offered = __import__(f"jumplora.{module}", fromlist=["x"]).__all__  # `#| exporti` keeps a name out of it
    tokens = tokenize.generate_tokens(io.StringIO(file_of(module).read_text(encoding="utf-8")).readline)
    commented = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and len(t.string) > 3}
    missing = []
    for o in (o for o in functions_and_classes(module) if o.name in offered):
        calls = [o] if isinstance(o, ast.FunctionDef) else []
        if isinstance(o, ast.ClassDef):
            calls = [m for m in o.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
            dataclass = any("dataclass" in ast.unparse(d) for d in o.decorator_list)
            fields = [f for f in o.body if isinstance(f, ast.AnnAssign)] if dataclass and not calls else []
            missing += [f"{o.name}.{f.target.id}" for f in fields if f.end_lineno not in commented]
        for f in calls:
            a = f.args
            defaults = [None] * (len(a.posonlyargs + a.args) - len(a.defaults)) + a.defaults
            pairs = [*zip(a.posonlyargs + a.args, defaults, strict=True)]
            pairs += zip(a.kwonlyargs, a.kw_defaults, strict=True)
            pairs += [(p, None) for p in (a.vararg, a.kwarg) if p]
            for p, default in pairs:
                if p.arg not in ("self", "cls") and (default or p).end_lineno not in commented:
                    missing.append(f"{o.name}({p.arg})")
            if f is o and f.returns is not None and ast.unparse(f.returns) != "None":
                if f.returns.end_lineno not in commented:
                    missing.append(f"{o.name} -> {ast.unparse(f.returns)}")
    assert not missing, f"jumplora.{module}: no trailing comment for {missing}"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_constant_is_explained_on_its_first_line_or_above(module):
    offered = __import__(f"jumplora.{module}", fromlist=["x"]).__all__
    source = file_of(module).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and not t.string.startswith("# %%")}
    bare = []
    for o in ast.parse(source).body:
        if isinstance(o, (ast.Assign, ast.AnnAssign)):
            (target,) = o.targets if isinstance(o, ast.Assign) else [o.target]
            if target.id in offered and not {o.lineno, o.lineno - 1} & commented:
                bare.append(target.id)
    assert not bare, f"jumplora.{module}: no comment for {bare}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is(module):
    doc = inspect.getdoc(__import__(f"jumplora.{module}", fromlist=["x"]))
    assert doc and len(doc.splitlines()) == 1 and doc.endswith("."), doc
