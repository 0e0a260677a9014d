"""What protects the reader of a page: title, lead, a text for every picture, nothing hidden, clean outputs.

Nothing here counts cells or lines: a page is as long as it has to be, and a reader decides.
"""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = {p.stem: p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts}
PAGES = [n for n in NBS if n != "index"]

# what is measured -> the most that is allowed
LIMITS = {
    "words before the first code": 90,
    "characters of a line of code": 110,
    "kilobytes of outputs, which a browser has to render": 300,
    "hidden cells that assert": 0,
    "cells that mix imports and other code": 0,
    "exported cells in a row without a sentence": 2,
    "pictures without a text for those who cannot see them": 0,
}
REBUILT = ("1_method", "2_learning")  # chapters; in the others exported cells may still follow one another


class Cell:
    "A cell with its directives (`#| name: value`) taken off."

    def __init__(self, raw: dict):
        self.kind, self.outputs = raw["cell_type"], raw.get("outputs", [])
        lines = "".join(raw["source"]).splitlines()
        heads = [o[2:].strip() for o in lines if o.startswith("#|")] if self.kind == "code" else []
        self.lines = [o for o in lines if not (self.kind == "code" and o.startswith("#|"))]
        self.source = "\n".join(self.lines)
        self.options = {h.partition(" ")[0].rstrip(":"): h.partition(" ")[2] for h in heads}
        self.exported = bool(self.options.keys() & {"export", "exports", "exporti"})
        off = any(self.options.get(o, "").lower() == "false" for o in ("echo", "include"))
        self.hidden = "hide" in self.options or off

    def body(self) -> list[ast.stmt]:
        "The statements of a code cell; magics count as nothing."
        return ast.parse("\n".join(o for o in self.lines if not o.lstrip().startswith(("%", "!")))).body


def cells(name: str) -> list[Cell]:
    return [Cell(c) for c in json.loads(NBS[name].read_text(encoding="utf-8"))["cells"]]


def words(text: str) -> int:
    "Words of prose: no code blocks, equations, tables or comments; an inline formula is one word."
    for pattern in (
        r"^(```|~~~).*?^\1",
        r"\$\$.*?\$\$",
        r"<!--.*?-->",
        r"^\|.*$",
        r"^:::.*$",
    ):
        text = re.sub(pattern, " ", text, flags=re.M | re.S if "?" in pattern else re.M)
    text = re.sub(r"\$[^$\n]+\$|`[^`\n]+`", "x", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return len(re.findall(r"[^\W_][\w'’.-]*", text))


def is_import(node: ast.stmt) -> bool:
    "An import, or the imports that only a type checker reads."
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, (ast.Import, ast.ImportFrom)) or (for_types and all(map(is_import, node.body)))


def asserts(cell: Cell) -> bool:
    nodes = ast.walk(ast.Module(cell.body(), []))
    calls = ("test_eq", "test_close", "test_ne", "test_fail", "assert_close", "assert_allclose")
    return any(
        isinstance(o, ast.Assert)
        or (isinstance(o, ast.Call) and getattr(o.func, "attr", getattr(o.func, "id", "")) in calls)
        for o in nodes
    )


def before_code(found: list[Cell]) -> str:
    "The Markdown before the first code cell, without the title and its sentence."
    code = [i for i, c in enumerate(found) if c.kind == "code" and "default_exp" not in c.options]
    text = "\n\n".join(c.source for c in found[: code[0] if code else None] if c.kind == "markdown")
    return re.sub(r"\A# .*\n+> .*", "", text).split("\n## ")[0]


def in_a_row(found: list[Cell]) -> int:
    "The longest run of exported cells with no Markdown between them."
    longest = run = 0
    for c in found:
        run = run + 1 if c.kind == "code" and c.exported else 0
        longest = max(longest, run)
    return longest


def measure(name: str) -> dict[str, int]:
    found = cells(name)
    code = [c for c in found if c.kind == "code"]
    pictures = [c for c in code if any("image/png" in o.get("data", {}) for o in c.outputs)]
    mixed = [c for c in code if any(map(is_import, c.body())) and not all(map(is_import, c.body()))]
    values = (
        words(before_code(found)) if name in PAGES else 0,
        max([len(o) for c in code for o in c.lines], default=0),
        sum(len(json.dumps(c.outputs)) for c in code) // 1000,
        sum(c.hidden and asserts(c) for c in code),
        len(mixed) if name in PAGES else 0,
        in_a_row(found),
        sum("fig-alt" not in c.options for c in pictures),
    )
    return dict(zip(LIMITS, values, strict=True))


@pytest.mark.parametrize("name", NBS)
def test_a_page_keeps_its_limits(name):
    limits, found = dict(LIMITS), measure(name)
    if NBS[name].parent.name not in REBUILT:
        del limits["exported cells in a row without a sentence"]
    over = [f"{found[what]} {what}, allowed {most}" for what, most in limits.items() if found[what] > most]
    assert not over, f"{name}: {'; '.join(over)}"


@pytest.mark.parametrize("name", NBS)
def test_a_cell_that_describes_a_picture_has_one(name):
    described = [c for c in cells(name) if "fig-alt" in c.options]
    bare = [c.source for c in described if not any("image/png" in o.get("data", {}) for o in c.outputs)]
    assert not bare, f"{name}: no picture in the output of {bare}"


@pytest.mark.parametrize("name", NBS)
def test_notebook_starts_with_a_title_and_one_sentence(name):
    first = next(c for c in cells(name) if c.kind == "markdown")
    found = re.match(r"# (?P<title>[^\n]+)\n\n> (?P<sentence>[^\n]+)\Z", first.source)
    assert found, (
        f"the first Markdown cell of {name} is not `# Title`, an empty line, `> one sentence` and nothing "
        "else: the site makes its title from that cell and drops the rest"
    )
    assert re.fullmatch(r"[^\n]*[^.\s][.?]", found["sentence"]), found["sentence"]
    assert not re.search(r"[.?!]\s+[A-Z]", found["sentence"]), f"more than one sentence: {found['sentence']}"
    assert len(found["title"]) <= 32, f"{found['title']!r} does not fit the sidebar"


@pytest.mark.parametrize("name", PAGES)
def test_notebook_ends_with_a_recap_and_something_to_try_and_a_guide_with_what_goes_wrong(name):
    heads = re.findall(r"^## (.+)$", "\n".join(c.source for c in cells(name) if c.kind == "markdown"), re.M)
    want = ["What goes wrong"] if NBS[name].parent.name == "4_guides" else ["Recap", "Try it"]
    ends = [h for h in heads if re.match(r"(Recap|Try it|What goes wrong)\b", h)][-len(want) :]
    assert ends == heads[-len(want) :] and len(ends) == len(want), (
        f"{name} ends with {heads[-2:]}, not {want}"
    )
    assert all(e.startswith(w) for e, w in zip(ends, want, strict=True)), (
        f"{name} ends with {ends}, not {want}"
    )


@pytest.mark.parametrize("name", PAGES)
def test_a_heading_comes_before_the_first_exported_definition(name):
    seen = False
    for c in cells(name):
        seen |= c.kind == "markdown" and bool(re.search(r"^## ", c.source, re.M))
        if c.kind == "code" and c.exported and not all(map(is_import, c.body())):
            assert seen, f"{name} defines something before its first `## heading`"
            break


MACHINE = re.compile(r"(?<![\w.~>$}-])/(?:home|Users|root|work|opt|mnt|private|srv)/[\w.]|\b[A-Z]:\\Users\\")
SCRATCH = re.compile(r"(?<![\w.~>$}-])/(?:tmp|var)/[\w.]")


def stored_texts(cell: Cell) -> list[str]:
    "The texts of a cell's outputs; pictures are no text."
    texts = ["".join(o["text"]) for o in cell.outputs if "text" in o]
    data = [d for o in cell.outputs for d in o.get("data", {}).items()]
    texts += ["".join(v) for k, v in data if k.startswith("text/")]
    return [re.sub(r"base64,[\w+/=\s]+", "", t) for t in texts]


@pytest.mark.parametrize("name", NBS)
def test_no_output_tells_of_a_machine_a_warning_or_an_error(name):
    for c in cells(name):
        kinds = {(o["output_type"], o.get("name")) for o in c.outputs}
        assert ("stream", "stderr") not in kinds, f"{name} has stored a warning under {c.source!r}"
        assert "error" not in {k for k, _ in kinds}, f"{name} has stored an exception under {c.source!r}"
        assert not MACHINE.search(c.source), f"{name} names a folder of one machine: {c.source}"
        for text in stored_texts(c):
            found = MACHINE.search(text) or SCRATCH.search(text)
            assert not found, f"{name} has stored a folder of one machine: ...{text[found.start() :][:80]}"
            assert " at 0x" not in text, f"{name} has stored an address in memory: {text[:80]}"


@pytest.mark.parametrize("name", PAGES)
def test_notebook_shows_its_outputs(name):
    last = [c for c in cells(name) if c.kind == "code" and c.body() and isinstance(c.body()[-1], ast.Expr)]
    shown = [c for c in last if c.options.get("eval") != "false" and not c.source.rstrip().endswith(";")]
    silent = [c.source for c in shown if not c.outputs and not c.exported]
    assert len(silent) <= len(shown) / 2, (
        f"{name}: most outputs are missing, run `make nbs NB={NBS[name].relative_to(ROOT)}`: {silent[:3]}"
    )


@pytest.mark.parametrize("name", NBS)
def test_the_site_knows_every_directive(name):
    about = "default_exp export exporti code-fold varies label fig-alt fig-cap".split()
    for cell in cells(name):
        values = {k: v for k, v in cell.options.items() if k not in about}
        assert values in ({}, {"echo": "false"}, {"eval": "false"}), f"docs/nbtool.py does not read {values}"


def test_the_rules_catch_what_they_forbid():
    hidden = Cell({"cell_type": "code", "source": "#| hide\nx = 1\nassert x == 1"})
    assert hidden.hidden and asserts(hidden)
    assert not Cell({"cell_type": "code", "source": "#| echo: true\nx = 1"}).hidden
    assert words("Two words, $a + b$ and `code here`.\n\n| a | table |\n\n```sh\nno words\n```\n$$ x $$") == 5
    folder = "/".join(["", "home", "x"])
    assert MACHINE.search(f"saved in {folder}")
    assert not MACHINE.search(f"https://a.org{folder} and ~{folder}")
    assert (
        before_code([Cell({"cell_type": "markdown", "source": "# T\n\n> s.\n\nAn opening."})]).strip()
        == "An opening."
    )
