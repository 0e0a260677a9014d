"""Run, compare, stage and check the notebooks (nbdev without Quarto).

python docs/nbtool.py run [NOTEBOOK ...]     execute notebooks in place and keep their outputs
python docs/nbtool.py check [NOTEBOOK ...]   execute notebooks, compare with the stored outputs, write nothing
python docs/nbtool.py readme                 write README.md from nbs/index.ipynb
python docs/nbtool.py stage                  write docs/_build/src, the pages that Sphinx builds
python docs/nbtool.py links                  check every link of docs/_build/html, offline
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import os
import re
import shutil
import sys
import tempfile
import time
import tokenize
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the number of threads changes the last digits of a sum
os.environ.pop("MPLBACKEND", None)  # the kernel's own, which puts figures into the notebook

import nbclient
import nbdev.serve
import nbformat
import yaml
from nbdev import processors
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import extract_directives
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
PROC, SRC, SITE = ROOT / "_proc", ROOT / "docs" / "_build" / "src", ROOT / "docs" / "_build" / "html"
CODE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)\s*?$|`[^`\n]+`)", re.M | re.S)
DIRECTIVES = re.compile(r"\A(?:#\|.*(?:\n|\Z))*")


def contents() -> dict[str, list[str]]:
    "The reading order, declared once, in the index: each row of its table is a chapter, each link a page."
    cells = nbformat.read(get_config().nbs_path / get_config().readme_nb, as_version=4).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    rows = re.findall(r"^\| \*\*(.+?)\*\*(.*)\|$", text.partition("## Contents")[2], re.M)
    return {caption: re.findall(r"\]\(([\w/]+)\.ipynb\)", links) for caption, links in rows}


def notebooks() -> list[Path]:
    "Every notebook in reading order, the index first."
    nbs = get_config().nbs_path
    pages = ["index", *(page for chapter in contents().values() for page in chapter)]
    paths = {p for p in nbs.rglob("*.ipynb") if not any(o[0] in "._" for o in p.relative_to(nbs).parts)}
    listed = [nbs / f"{page}.ipynb" for page in pages]
    odd = [str(p.relative_to(nbs)) for p in sorted(paths ^ set(listed))]
    assert not odd and len(set(listed)) == len(listed), f"index.ipynb must list each page once: {odd}"
    return listed


def directives(cell) -> dict:
    "The `#|` lines at the top of a cell."
    return extract_directives(nbformat.from_dict(cell), remove=False)


# ---------------------------------------------------------------- run and check


class Runner(nbclient.NotebookClient):
    "Execute a notebook, leaving alone the cells that plain `nbdev_test` leaves alone."

    skip: set[str] = set()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code":
            d = directives(cell)
            off = (
                d.get("eval:", [""])[0].lower() == "false"
                or self.skip & d.keys()
                or "nbdev_export(" in cell.source
            )
            if off:
                return cell  # its stored outputs stay as they are
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def with_palette(png: str) -> str:
    "A picture with at most 256 colours: a drawing looks the same in half the bytes. Both are base64."
    from PIL import Image

    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return min(png, base64.b64encode(small.getvalue()).decode(), key=len)


def execute(path: Path):
    "The notebook at `path`, executed with a fresh kernel."
    nb = nbformat.read(path, as_version=4)
    client = Runner(
        nb,
        timeout=1800,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.skip = set(get_config().tst_flags.split())
    client.execute()
    for output in (o for cell in nb.cells for o in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            output["data"]["image/png"] = with_palette(output["data"]["image/png"])
    return nb


def run_one(path: Path) -> tuple[str, bool]:
    start = time.time()
    try:
        nb = execute(path)
    except nbclient.exceptions.CellExecutionError as e:
        return f"{path.name}: FAILED\n{e}", False
    nbformat.write(nb, path)
    nbdev_clean(str(path))
    return f"{path.name}: {time.time() - start:.1f} s", True


NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.?\d*(?:e[-+]?\d+)?|(?<![\w.])[-+]?\.\d+", re.I)


def nearly(a: str, b: str) -> bool:
    "Whether two texts differ in the last digits of their numbers only."
    if NUMBER.sub("#", a).split() != NUMBER.sub("#", b).split():
        return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=True)
    return all(abs(float(x) - float(y)) <= 1e-4 + 1e-3 * abs(float(y)) for x, y in pairs)


def nearly_image(a: str, b: str) -> bool:
    "Whether two pictures look the same."
    import numpy as np
    from PIL import Image

    x, y = (np.asarray(Image.open(io.BytesIO(base64.b64decode(o))).convert("RGB"), float) for o in (a, b))
    return x.shape == y.shape and (abs(x - y).max(2) > 64).mean() < 1e-3


def difference(old: dict, new: dict) -> str:
    "'' when two outputs are equal, 'near' when only last digits differ, else what differs."
    flat = [{"stream": o["text"]} if "text" in o else dict(o.get("data", {})) for o in (old, new)]
    if flat[0] == flat[1]:
        return ""
    if flat[0].keys() != flat[1].keys():
        return f"stored {sorted(flat[0])}, got {sorted(flat[1])}"
    for kind, (x, y) in ((k, (flat[0][k], flat[1][k])) for k in flat[0]):
        close = nearly_image if kind == "image/png" else nearly
        if x != y and not close(x, y):
            return f"{kind} differs" if kind == "image/png" else f"stored: {x.strip()}\ngot:    {y.strip()}"
    return "near"


def check_one(path: Path) -> tuple[str, bool]:
    "Execute a copy and compare its outputs; cells marked `#| varies` (times, say) are not compared."
    start, bad, near = time.time(), [], 0
    try:
        nb = execute(path)
    except nbclient.exceptions.CellExecutionError as e:
        return f"{path.name}: FAILED\n{e}", False
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        nbformat.write(nb, copy)
        nbdev_clean(str(copy))
        got, stored = nbformat.read(copy, as_version=4), nbformat.read(path, as_version=4)
    for old, new in zip(stored.cells, got.cells, strict=True):
        if old.cell_type != "code" or "varies" in directives(old):
            continue
        if len(old.outputs) != len(new.outputs):
            bad.append(f"cell {old.id}: {len(old.outputs)} outputs stored, {len(new.outputs)} now")
            continue
        found = [difference(a, b) for a, b in zip(old.outputs, new.outputs, strict=True)]
        near += found.count("near")
        bad += [f"cell {old.id}: {f}" for f in found if f not in ("", "near")]
    words = [f"{path.name}: {time.time() - start:.1f} s", "DIFFERENT, run `make nbs`" if bad else "the same"]
    if near:
        words.append(f"{near} outputs differ in last digits only (another processor)")
    return "\n".join([", ".join(words), *bad]), not bad


def each(work, paths: list[Path], jobs: int) -> int:
    "Do `work` on every notebook, a few at a time; 0 when all went well."
    import matplotlib.font_manager  # noqa: F401  builds its font list now, not in a notebook's output

    good = True
    with ProcessPoolExecutor(min(jobs, len(paths))) as pool:
        for text, fine in pool.map(work, paths):
            print(text, flush=True)
            good &= fine
    return 0 if good else 1


# ---------------------------------------------------------------- stage


def outside_code(f, text: str) -> str:
    "Apply `f` to the parts of a Markdown `text` that are not code."
    return "".join(o if i % 2 else f(o) for i, o in enumerate(CODE.split(text)))


def to_myst(text: str) -> str:
    "Turn the little Quarto that nbdev uses into MyST."
    cfg = get_config()
    base = re.escape(f"{cfg.doc_host}{cfg.doc_baseurl}".rstrip("/") + "/")

    def f(s: str) -> str:
        s = re.sub(r"\$\$\s*\{#(eq-[\w-]+)\}", r"$$ (\1)", s)
        s = re.sub(r"(?<![\w`])@(eq-[\w-]+)", r"{eq}`\1`", s)
        s = re.sub(r"(?<![\w`])@(fig-[\w-]+)", r"{numref}`\1`", s)
        s = re.sub(r"^(:{3,})\s*\{\.callout-(\w+)[^}]*\}", r"\1{\2}", s, flags=re.M)
        return s

    text = outside_code(f, text)
    # nbdev turns `name` into a link to the published site: make it a link inside this one
    return re.sub(rf"\]\({base}(?:[\w-]+/)?([\w-]+)\.html#([\w.]+)\)", r"](#\1.\2)", text)


def options(cell) -> dict[str, str]:
    "Take the `#| key: value` lines off the top of a code cell."
    head = DIRECTIVES.match(cell.source)[0]
    cell.source = cell.source[len(head) :]
    pairs = (o[2:].strip().split(": ", 1) for o in head.splitlines() if ": " in o)
    return {k: v.strip().strip("\"'") for k, v in pairs}


def defined(source: str) -> dict[str, ast.AST]:
    "What a cell defines: functions, classes, their methods as `Class.method`, and constants."
    names = {}
    for o in ast.parse(source).body:
        if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[o.name] = o
            if isinstance(o, ast.ClassDef):
                names |= {f"{o.name}.{m.name}": m for m in o.body if isinstance(m, ast.FunctionDef)}
        elif isinstance(o, (ast.Assign, ast.AnnAssign)):
            targets = o.targets if isinstance(o, ast.Assign) else [o.target]
            names |= {t.id: o for t in targets if isinstance(t, ast.Name)}
    return names


def only_imports(source: str) -> bool:
    "Whether a cell imports and does nothing else: a page folds it."
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    body = ast.parse("\n".join(lines)).body
    for_types = [isinstance(o, ast.If) and ast.unparse(o.test) == "TYPE_CHECKING" for o in body]
    imports = [isinstance(o, (ast.Import, ast.ImportFrom)) for o in body]
    return any(imports) and all(map(max, imports, for_types))


def public(names: dict[str, ast.AST]) -> list[str]:
    return [n for n in names if "." not in n and not n.startswith("_")]


def label(stem: str, name: str, node: ast.AST) -> str:
    "The target of a name. Labels have no case: `NEWSROOM` must not be `newsroom`."
    return f"{stem}.{name.lower()}" + ("-value" if isinstance(node, (ast.Assign, ast.AnnAssign)) else "")


def heading(cell, stem: str, seen: set[str]) -> list:
    "The names that an exported cell defines, as targets of links (the first time) and as a heading."
    names = {n: o for n, o in defined(cell.source).items() if n not in seen}
    seen |= names.keys()
    if not names:
        return []
    targets = "\n".join(f"({label(stem, n, o)})=" for n, o in names.items())
    show = ", ".join(f"`{n}`" for n in public(names))
    # a target must stand before something: before the heading, or before an empty paragraph
    return [new_markdown_cell(f"{targets}\n### {show}" if show else f"{targets}\n<span></span>")]


def comments(source: str) -> dict[int, str]:
    "The trailing comment of each line of a source."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def parameters(cell) -> list:
    "The parameters of a cell's public functions and classes as tables, folded under the source."
    said, out = comments(cell.source), []

    def row(name, annotation, default, line):
        cells = (f"`{ast.unparse(o)}`" if o is not None else "" for o in (annotation, default))
        return (
            "| " + " | ".join(o.replace("|", r"\|") for o in (f"`{name}`", *cells, said.get(line, ""))) + " |"
        )

    for name, o in defined(cell.source).items():
        if name not in public({name: o}) or isinstance(o, (ast.Assign, ast.AnnAssign)):
            continue
        rows, call = [], o
        if isinstance(o, ast.ClassDef):
            call = next((m for m in o.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
            fields = [f for f in o.body if isinstance(f, ast.AnnAssign)] if call is None else []
            rows = [row(f.target.id, f.annotation, f.value, f.end_lineno) for f in fields]
        if call is not None:
            a = call.args
            args, defaults = a.posonlyargs + a.args, a.defaults
            pairs = list(zip(args, [None] * (len(args) - len(defaults)) + defaults, strict=True))
            pairs += [(v, None) for v in (a.vararg,) if v] + list(
                zip(a.kwonlyargs, a.kw_defaults, strict=True)
            )
            pairs += [(v, None) for v in (a.kwarg,) if v]
            rows = [
                row(p.arg, p.annotation, d, (d or p).end_lineno)
                for p, d in pairs
                if p.arg not in ("self", "cls")
            ]
            if call is o and o.returns is not None and rows:
                rows.append(row("returns", o.returns, None, o.returns.end_lineno))
        if rows:
            top = f'<details class="api"><summary>Parameters of <code>{name}</code></summary>'
            table = "\n".join(["| name | type | default | meaning |", "|---|---|---|---|", *rows])
            out.append(new_markdown_cell(f"{top}\n\n{table}\n\n</details>"))
    return out


def page(nb, name: str, raw: Path):
    "Turn one processed notebook into a MyST-NB page; `name` is its path without `.ipynb`."
    cells, seen, stem = [], set(), raw.stem
    for c in nb.cells:
        if c.cell_type == "raw" and c.source.lstrip().startswith("---"):
            fm = yaml.safe_load(c.source.strip().strip("-"))
            lead = f"\n\n{{.lead}}\n{to_myst(fm['description'])}" if fm.get("description") else ""
            cells.append(new_markdown_cell(f"# {fm['title']}{lead}\n\n{{.meta}}\n{meta(name, raw)}"))
        elif c.cell_type == "markdown":
            c.source = to_myst(c.source)
            cells.append(c)
        elif c.cell_type == "code":
            opt = options(c)
            if c.source.startswith("show_doc("):
                continue  # the source of what is exported is on the page
            tags = {"echo": "remove-input", "output": "remove-output", "include": "remove-cell"}
            c.metadata["tags"] = [tag for k, tag in tags.items() if opt.get(k, "").lower() == "false"]
            if "exported" in opt:
                c.metadata["tags"].append("exported")
                cells += heading(c, stem, seen)
            if opt.get("code-fold") or only_imports(c.source):
                c.metadata["tags"].append("hide-input")
            show = {}
            if "fig-alt" in opt:
                show["image"] = {"alt": opt["fig-alt"]}
            if "fig-cap" in opt:
                show["figure"] = {"caption": opt["fig-cap"], "name": opt.get("label", "")}
            if show:
                c.metadata["mystnb"] = show
            for data in (o.data for o in c.outputs if "text/markdown" in o.get("data", {})):
                data["text/markdown"] = to_myst("".join(data["text/markdown"]))
            cells.append(c)
            if "exported" in opt:
                cells += parameters(c)
    nb.cells = cells
    nb.metadata.clear()
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return nb


def module_of(raw: Path) -> str:
    "The module that a notebook exports, or ''."
    found = re.search(
        r"#\|\s*default_exp\s+([\w.]+)", "\n".join(c.source for c in nbformat.read(raw, 4).cells)
    )
    return f"{get_config().lib_path.name}.{found[1]}" if found else ""


def meta(name: str, raw: Path) -> str:
    "The line under a title: where the page comes from."
    module = module_of(raw)
    return (
        f"module `{module}` · " if module else ""
    ) + f"notebook {{download}}`{raw.name} </notebooks/{name}.ipynb>`"


def names_page(raws: list[Path]) -> str:
    "A page with every public name of the package, by module."
    offered = __import__(get_config().lib_path.name).__all__
    out = [
        "# All names\n\n{.lead}\nEvery public name, by module, with a link to the cell that defines it.\n\n"
        "The bold ones can be imported from `jumplora` itself."
    ]
    for raw in raws:
        rows, seen = [], set()
        for c in nbformat.read(raw, 4).cells:
            if c.cell_type == "code" and directives(c).keys() & {"export", "exports"}:
                source = DIRECTIVES.sub("", c.source)
                names, said = defined(source), comments(source)
                for n in (n for n in public(names) if n not in seen):
                    o = names[n]
                    seen.add(n)
                    constant = isinstance(o, (ast.Assign, ast.AnnAssign))
                    doc = said.get(o.lineno, "") if constant else ast.get_docstring(o) or ""
                    line = doc.split("\n")[0].replace("|", r"\|")
                    link = f"[`{n}`](#{label(raw.stem, n, o)})"
                    rows.append(f"| {f'**{link}**' if n in offered else link} | {line} |")
        if rows:
            rows = "\n".join(rows)
            out.append(f"## `{module_of(raw)}`\n\n| name | what it is |\n|---|---|\n{rows}")
    return "\n\n".join(out) + "\n"


def toctree(extra: list[str]) -> str:
    "The sidebar: the chapters of the contents, and the pages that are no notebooks under the last of them."
    groups = contents()
    groups[list(groups)[-1]] += extra
    return "\n\n".join(
        f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(group) + "\n```"
        for caption, group in groups.items()
    )


def keep_export(cell):
    "nbdev drops exported cells from a page and runs them to show a signature; here the source is the page."
    d = cell.directives_ or {}
    if d.keys() & {"hide", "default_exp"}:
        del cell["source"]
    elif d.keys() & {"export", "exporti", "exports"}:
        cell.source = f"#| exported: true\n{cell.source}"


class Processors(processors.FilterDefaults):
    "nbdev's own steps, without those that execute cells."

    def base_procs(self):
        p = processors
        first = [p.FrontmatterProc, p.populate_language, p.strip_ansi, p.hide_line, p.filter_stream_]
        return [*first, p.rm_header_dash, keep_export, p.clean_magics, p.hide_, p.add_links]


def process() -> None:
    "Let nbdev process the notebooks: directives and links. Nothing is executed and no Quarto is called."
    nbdev.serve.FilterDefaults = Processors
    shutil.rmtree(PROC, ignore_errors=True)
    nbdev.serve.proc_nbs(str(get_config().nbs_path), n_workers=0, force=True)


def stage() -> None:
    "Write the pages that Sphinx builds: one per notebook, docs/*.md, and the list of names."
    process()
    for folder in (SRC, SITE, SITE.with_name("doctrees")):  # nothing of a page that is gone stays
        shutil.rmtree(folder, ignore_errors=True)
    SRC.mkdir(parents=True)
    nbs, raws = get_config().nbs_path, notebooks()
    extra = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    for path in extra:
        text = path.read_text(encoding="utf-8").replace("](../nbs/", "](")
        (SRC / path.name).write_text(to_myst(text), encoding="utf-8")
    (SRC / "names.md").write_text(names_page(raws), encoding="utf-8")
    for raw in raws:
        path = raw.relative_to(nbs)
        nb = page(nbformat.read(PROC / path, as_version=4), path.with_suffix("").as_posix(), raw)
        if path.name == get_config().readme_nb:
            nb.cells.append(new_markdown_cell(toctree(["names", *(p.stem for p in extra)])))
        for c in nb.cells:
            c.setdefault("id", new_code_cell().id)
            if c.cell_type == "markdown":  # files outside of nbs/ lie beside its pages here
                c.source = re.sub(r"\.\./(?:docs/|(?=[A-Z]+\.md))", "", c.source)
        for out in (SRC / path, SRC / "notebooks" / path):
            out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, SRC / path)
        shutil.copy(raw, SRC / "notebooks" / path)
    for p in PROC.rglob("*"):  # images that the Markdown uses
        if p.suffix in {".png", ".svg", ".jpg", ".gif"}:
            (SRC / p.relative_to(PROC)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, SRC / p.relative_to(PROC))
    print(f"staged {len(raws) + len(extra) + 1} pages in {SRC.relative_to(ROOT)}")


# ---------------------------------------------------------------- readme


def bare_table(html: str) -> str:
    "The table of a data frame's HTML, without styles: a README shows it as a table."
    table = re.search(r"<table.*?</table>", html, re.S)[0]
    table = re.sub(r' (?:border="\d+"|class="[^"]*"|style="[^"]*")', "", table)
    return re.sub(r"\n\s*", "\n", table)


CALLOUT = re.compile(r"^(:{3,})\s*\{\.callout-(\w+)[^}]*\}\n(.*?)^\1[ ]*$", re.M | re.S)


def to_github(text: str) -> str:
    "Turn the little Quarto that nbdev uses into what a README may have."

    def callout(m):
        return "\n".join(f"> {o}".rstrip() for o in [f"[!{m[2].upper()}]", *m[3].strip().splitlines()])

    def f(s: str) -> str:
        s = re.sub(r"\$\$\s*\{#eq-[\w-]+\}", "$$", s)
        return re.sub(
            r"(?<![\w`])@(eq|fig)-[\w-]+", lambda m: {"eq": "the equation", "fig": "the figure"}[m[1]], s
        )

    text = outside_code(f, CALLOUT.sub(callout, text))
    nbs = get_config().nbs_path.name
    text = re.sub(r"\]\(([\w./-]+\.ipynb)", rf"]({nbs}/\1", text).replace("](../", "](")
    return re.sub(r"\]\((?!\w+:|nbs/|#|/)([\w./-]+\.(?:png|svg))", rf"]({nbs}/\1", text)


def readme(show: bool = False) -> None:
    "README.md from the index notebook, with its stored outputs (nbdev_readme needs Quarto for this)."
    cfg = get_config()
    nb = nbformat.read(cfg.nbs_path / cfg.readme_nb, as_version=4)
    figs = ROOT / cfg.nbs_path.name / f"{Path(cfg.readme_nb).stem}_files"
    if not show:
        shutil.rmtree(figs, ignore_errors=True)
    out = ["<!-- Written from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->"]
    n = 0
    for c in nb.cells:
        if c.cell_type == "markdown":
            out.append(to_github(c.source))
        elif c.cell_type == "code":
            d = directives(c)
            if (
                d.keys() & {"hide", "default_exp", "export", "exporti"}
                or d.get("include:", [""])[0] == "false"
            ):
                continue
            opt = options(c)
            if opt.get("echo") != "false":
                out.append(f"```python\n{c.source}\n```")
            for o in c.get("outputs", []) if opt.get("output") != "false" else []:
                data = o.get("data", {})
                if "image/png" in data:
                    n += 1
                    if not show:
                        figs.mkdir(exist_ok=True)
                        (figs / f"figure-{n}.png").write_bytes(base64.b64decode(data["image/png"]))
                    alt = opt.get("fig-alt", "").translate(str.maketrans("[]", "()"))
                    out.append(f"![{alt}]({figs.relative_to(ROOT)}/figure-{n}.png)")
                elif "text/markdown" in data:
                    out.append(to_github(data["text/markdown"]))
                elif "<table" in data.get("text/html", ""):
                    out.append(bare_table(data["text/html"]))
                else:
                    text = o.get("text") or data.get("text/plain", "")
                    out.append("\n".join("    " + s for s in text.splitlines()))
    text = "\n\n".join(o.strip("\n") for o in out) + "\n"
    sys.stdout.write(text) if show else (ROOT / "README.md").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- links


class Page(HTMLParser):
    "The ids of a page, and what it points to and loads."

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag in {"img", "script", "source", "iframe", "video", "audio", "embed"} and a.get("src"):
            self.loads.append(a["src"])
        rel = set((a.get("rel") or "").split())
        if (
            tag == "link"
            and a.get("href")
            and rel & {"stylesheet", "icon", "preload", "modulepreload", "preconnect"}
        ):
            self.loads.append(a["href"])


def links() -> int:
    "Every relative link must lead to a file and an id, and nothing may be loaded from another host."
    pages = {}
    for p in SITE.rglob("*.html"):
        pages[p] = Page()
        pages[p].feed(p.read_text(encoding="utf-8"))
    bad, n = [], 0
    own = f"{get_config().doc_host}{get_config().doc_baseurl}"
    for p, pg in pages.items():
        for kind, url in [("link", u) for u in pg.links] + [("load", u) for u in pg.loads]:
            s = urlsplit(url)
            if s.scheme or s.netloc:
                if kind == "load" and s.scheme != "data":
                    bad.append(f"{p.relative_to(SITE)}: loads {url}")
                if url.startswith(own) or url.startswith(get_config().git_url):
                    bad.append(f"{p.relative_to(SITE)}: links to a placeholder address, {url}")
                continue
            n += 1
            to = (p.parent / unquote(s.path)).resolve() if s.path else p
            to = to / "index.html" if to.is_dir() else to
            if not to.exists():
                bad.append(f"{p.relative_to(SITE)}: no file for {url}")
            elif s.fragment and to in pages and unquote(s.fragment) not in pages[to].ids:
                bad.append(f"{p.relative_to(SITE)}: no id for {url}")
    for css in [*SITE.rglob("*.css")]:
        for u in re.findall(
            r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')]+)",
            css.read_text(encoding="utf-8", errors="ignore"),
        ):
            bad.append(f"{css.relative_to(SITE)}: loads {u}")
    print(
        "\n".join(sorted(set(bad)))
        or f"{n} local links of {len(pages)} pages hold; nothing is loaded from another host"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("command", choices=["run", "check", "readme", "stage", "links"])
    ap.add_argument("paths", nargs="*", type=Path)
    ap.add_argument("--stdout", action="store_true", help="readme: print it instead of writing it")
    ap.add_argument("-j", "--jobs", type=int, default=min(4, os.cpu_count() or 1), help="notebooks at a time")
    a = ap.parse_args()
    paths = [p.resolve() for p in a.paths]
    os.chdir(ROOT)
    if a.command in ("run", "check"):
        sys.exit(each({"run": run_one, "check": check_one}[a.command], paths or notebooks(), a.jobs))
    elif a.command == "readme":
        readme(a.stdout)
    else:
        sys.exit({"stage": stage, "links": links}[a.command]())
