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
import time
import tokenize
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the number of threads changes the last digits of a sum
os.environ.pop("MPLBACKEND", None)  # the kernel's own, which puts figures into the notebook

import nbclient
import nbformat
from nbdev.clean import clean_nb, nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
SRC, SITE = ROOT / "docs" / "_build" / "src", ROOT / "docs" / "_build" / "html"
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


def directives(cell) -> dict[str, str]:
    "The `#| name: value` lines at the top of a cell."
    lines = DIRECTIVES.match(cell.source)[0].splitlines()
    pairs = (line[2:].strip().partition(" ") for line in lines)
    return {name.rstrip(":"): value.strip().strip("\"'") for name, _, value in pairs}


# ---------------------------------------------------------------- run and check


class Runner(nbclient.NotebookClient):
    "Execute a notebook, leaving alone the cells that `nbdev_test` leaves alone."

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if directives(cell).get("eval") == "false":
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
    quiet = ["--IPKernelApp.log_level=40"]
    place = {"metadata": {"path": str(path.parent)}}
    Runner(nb, timeout=1800, kernel_name="python3", extra_arguments=quiet, resources=place).execute()
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
    old, new = ({"stream": o["text"]} if "text" in o else dict(o.get("data", {})) for o in (old, new))
    if old.keys() != new.keys():
        return f"stored {sorted(old)}, got {sorted(new)}"
    for kind, x in old.items():
        y, picture = new[kind], kind == "image/png"
        if x != y and not (nearly_image if picture else nearly)(x, y):
            return f"{kind} differs" if picture else f"stored: {x.strip()}\ngot:    {y.strip()}"
    return "near" if old != new else ""


def check_one(path: Path) -> tuple[str, bool]:
    "Execute a copy and compare its outputs; cells marked `#| varies` (times, say) are not compared."
    start, bad, near = time.time(), [], 0
    try:
        nb = execute(path)
    except nbclient.exceptions.CellExecutionError as e:
        return f"{path.name}: FAILED\n{e}", False
    clean_nb(nb)
    stored = nbformat.read(path, as_version=4)
    for old, new in zip(stored.cells, nb.cells, strict=True):
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


def to_myst(text: str) -> str:
    "Links to names inside this site."
    cfg = get_config()
    base = re.escape(f"{cfg.doc_host}{cfg.doc_baseurl}".rstrip("/") + "/")
    # nbdev turns `name` into a link to the published site: make it a link inside this one
    return re.sub(rf"\]\({base}(?:[\w-]+/)?([\w-]+)\.html#([\w.]+)\)", r"](#\1.\2)", text)


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
    body, kinds = ast.parse(source).body, (ast.Import, ast.ImportFrom)
    return all(isinstance(o, kinds) or ast.unparse(o).startswith("if TYPE_CHECKING") for o in body)


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


def page(raw: Path):
    "The MyST-NB page of a notebook."
    nb, cells, seen, names = nbformat.read(raw, as_version=4), [], set(), NbdevLookup()
    for c in nb.cells:
        if c.cell_type == "markdown":
            if c.source.startswith("# "):
                title, lead = c.source.split("\n\n> ")
                c.source = f"{title}\n\n{{.lead}}\n{to_myst(lead)}\n\n{{.meta}}\n{meta(raw)}"
            else:
                c.source = to_myst(names.linkify(c.source))
            cells.append(c)
            continue
        opt = directives(c)
        if "default_exp" in opt:
            continue
        c.source = DIRECTIVES.sub("", c.source)
        exported = opt.keys() & {"export", "exporti"}
        tags = {
            "remove-input": opt.get("echo") == "false",
            "exported": exported,
            "hide-input": "code-fold" in opt or only_imports(c.source),
        }
        c.metadata["tags"] = [tag for tag, on in tags.items() if on]
        show = {}
        if "fig-alt" in opt:
            show["image"] = {"alt": opt["fig-alt"]}
        if "fig-cap" in opt:
            show["figure"] = {"caption": opt["fig-cap"], "name": opt.get("label", "")}
        if show:
            c.metadata["mystnb"] = show
        for data in (o.data for o in c.outputs if "text/markdown" in o.get("data", {})):
            data["text/markdown"] = to_myst(names.link_line(data["text/markdown"]))
        cells += [*heading(c, raw.stem, seen), c, *parameters(c)] if exported else [c]
    nb.cells = cells
    nb.metadata.clear()
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return nb


def module_of(raw: Path) -> str:
    "The module that a notebook exports, or ''."
    found = re.search(r'"#\| default_exp ([\w.]+)', raw.read_text("utf-8"))
    return f"{get_config().lib_path.name}.{found[1]}" if found else ""


def meta(raw: Path) -> str:
    "The line under a title: where the page comes from."
    module, place = module_of(raw), raw.relative_to(get_config().nbs_path).as_posix()
    note = f"notebook {{download}}`{raw.name} </notebooks/{place}>`"
    return f"module `{module}` · {note}" if module else note


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
            if c.cell_type == "code" and "export" in directives(c):
                source = DIRECTIVES.sub("", c.source)
                names, said = defined(source), comments(source)
                for n in (n for n in public(names) if n not in seen):
                    o = names[n]
                    seen.add(n)
                    constant = isinstance(o, (ast.Assign, ast.AnnAssign))
                    doc = (
                        (said.get(o.lineno) or said.get(o.lineno - 1, ""))
                        if constant
                        else ast.get_docstring(o) or ""
                    )
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


def stage() -> None:
    "Write the pages that Sphinx builds: one per notebook, docs/*.md, and the list of names."
    for folder in (SRC, SITE, SITE.with_name("doctrees")):  # nothing of a page that is gone stays
        shutil.rmtree(folder, ignore_errors=True)
    nbs, raws = get_config().nbs_path, notebooks()
    shutil.copytree(nbs, SRC / "notebooks", ignore=shutil.ignore_patterns(".*", "*_files"))  # for downloads
    extra = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    for path in extra:
        text = path.read_text(encoding="utf-8").replace("](../nbs/", "](")
        (SRC / path.name).write_text(to_myst(text), encoding="utf-8")
    (SRC / "names.md").write_text(names_page(raws), encoding="utf-8")
    for raw in raws:
        path, nb = raw.relative_to(nbs), page(raw)
        if path.name == get_config().readme_nb:
            nb.cells.append(new_markdown_cell(toctree(["names", *(p.stem for p in extra)])))
        for c in nb.cells:
            if c.cell_type == "markdown":  # files outside of nbs/ lie beside its pages here
                c.source = re.sub(r"\.\./(?:docs/|(?=[A-Z]+\.md))", "", c.source)
        (SRC / path).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, SRC / path)
    print(f"staged {len(raws) + len(extra) + 1} pages in {SRC.relative_to(ROOT)}")


# ---------------------------------------------------------------- readme


def to_github(text: str) -> str:
    "The links of the index, from the folder above it."
    nbs = get_config().nbs_path.name
    return re.sub(r"\]\(([\w./-]+\.ipynb)", rf"]({nbs}/\1", text).replace("](../", "](")


def readme(show: bool = False) -> None:
    "README.md from the index notebook, with its stored outputs (nbdev_readme needs Quarto for this)."
    cfg = get_config()
    figs = ROOT / cfg.nbs_path.name / f"{Path(cfg.readme_nb).stem}_files"
    if not show:
        shutil.rmtree(figs, ignore_errors=True)
    out = ["<!-- Written from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->"]
    n = 0
    for c in nbformat.read(cfg.nbs_path / cfg.readme_nb, as_version=4).cells:
        if c.cell_type == "markdown":
            out.append(to_github(c.source))
            continue
        opt = directives(c)
        if opt.get("echo") != "false":
            out.append(f"```python\n{DIRECTIVES.sub('', c.source)}\n```")
        for data in (o.data for o in c.outputs):
            if "image/png" in data:
                n += 1
                if not show:
                    figs.mkdir(exist_ok=True)
                    (figs / f"figure-{n}.png").write_bytes(base64.b64decode(data["image/png"]))
                out.append(f"![{opt.get('fig-alt', '')}]({figs.relative_to(ROOT)}/figure-{n}.png)")
            else:
                out.append(to_github(data["text/markdown"]))
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
