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
NBS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))


def code_of(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "code")


def module_of(path: Path) -> str | None:
    found = re.search(r"^#\|\s*default_exp\s+(\w+)", code_of(path), re.M)
    return found and found[1]


NOTEBOOK = {module_of(p): p.name for p in NBS if module_of(p)}
MODULES = sorted(NOTEBOOK)


def imported(source: str) -> set[str]:
    "The modules of the package that a source imports, wherever in it."
    lines = [o for o in source.splitlines() if not o.lstrip().startswith(("%", "!"))]
    names = set()
    for o in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(o, ast.ImportFrom):
            if o.level == 1 and o.module:  # nbdev turns `from jumplora.x` into `from .x`
                names.add(o.module)
            elif (
                o.level == 1 or o.module == "jumplora"
            ):  # a module, or a name that the package loads from one
                names |= {jumplora._NAMES.get(a.name, a.name) for a in o.names}
            elif (o.module or "").startswith("jumplora."):
                names.add(o.module.split(".")[1])
        elif isinstance(o, ast.Import):
            names |= {a.name.split(".")[1] for a in o.names if a.name.startswith("jumplora.")}
    return names & set(MODULES)


@pytest.mark.parametrize("path", [p for p in NBS if p.name[0].isdigit()], ids=lambda p: p.name)
def test_a_notebook_imports_only_from_those_before_it(path):
    own = module_of(path)
    upward = {m: NOTEBOOK[m] for m in imported(code_of(path)) if m != own and NOTEBOOK[m] >= path.name}
    assert not upward, f"{path.name} imports from {upward}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_notebooks_before_its_own(module):
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    upward = {m: NOTEBOOK[m] for m in imported(source) - {module} if NOTEBOOK[m] > NOTEBOOK[module]}
    assert not upward, f"jumplora.{module} imports from {upward}"


def test_the_order_is_the_order_of_file_names():
    assert sorted(["07_metrics", "06c_backbones", "06_tasks"]) == ["06_tasks", "06c_backbones", "07_metrics"]
    assert all(re.match(r"\d\d[a-z]?_[a-z_]+\.ipynb$|index\.ipynb$", p.name) for p in NBS)


def in_fresh_python(code: str) -> str:
    "What a program prints in a Python of its own; it must succeed."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    heavy = "torch transformers peft datasets pandas matplotlib numpy".split()
    code = f"import sys, jumplora; dir(jumplora); print([m for m in {heavy} if m in sys.modules])"
    assert in_fresh_python(code).strip() == "[]"


def test_the_package_needs_no_development_tools():
    block = "import sys; sys.modules.update(dict.fromkeys(['nbdev', 'fastcore', 'execnb']))"
    imports = "; ".join(f"import jumplora.{m}" for m in MODULES)
    assert in_fresh_python(f"{block}; {imports}; print('fine')").strip() == "fine"


def test_the_exported_modules_are_those_of_the_notebooks():
    files = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "_modidx"}
    assert files == set(MODULES)


def test_a_public_name_is_never_the_name_of_a_module():
    # else `from jumplora import x` would give the function or the module, whichever was loaded first
    assert not set(jumplora._NAMES) & set(MODULES)


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
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
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


def public_functions(module: str):
    "The public functions, classes and their `__init__` of a module, with the lines that have a comment."
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and len(t.string) > 3}
    for o in ast.parse(source).body:
        if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not o.name.startswith("_"):
            yield o, commented


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    bare = [o.name for o, _ in public_functions(module) if not ast.get_docstring(o)]
    assert not bare, f"no docstring in jumplora.{module}: {bare}"


@pytest.mark.parametrize("module", MODULES)
def test_every_parameter_and_return_is_explained_on_its_line(module):
    missing = []
    for o, commented in public_functions(module):
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
def test_a_module_says_what_it_is(module):
    doc = inspect.getdoc(__import__(f"jumplora.{module}", fromlist=["x"]))
    assert doc and len(doc.splitlines()) == 1 and doc.endswith("."), doc
