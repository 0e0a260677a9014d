"The built site, read in a headless browser: maths, search, dark mode, a phone, and no other host."

import json
import re
from urllib.parse import urlsplit

import pytest
from browser import chromium, open_tab, serve

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def address(site):
    with serve(site) as url:
        yield url


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with open_tab(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


FACTS = """(() => {
    const all = (what) => [...document.querySelectorAll(what)];
    const light = (e, of) => { const c = getComputedStyle(e)[of].match(/[\\d.]+/g).map(Number);
        return c[3] === 0 ? null : (0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]) / 255; };
    const over = (e) => getComputedStyle(e).overflowX;
    const scrolls = (e) => e && (/auto|scroll/.test(over(e)) || scrolls(e.parentElement));
    const beyond = (e) => !e.closest('details') && e.getBoundingClientRect().right > innerWidth;
    return {
        width: document.documentElement.scrollWidth,
        stuck: all('article table, article pre').filter(e => beyond(e) && !scrolls(e)).map(e => e.innerText),
        asked: all('span.math, div.math').length,
        set: all('.math mjx-container svg').length,
        wrong: all('mjx-merror, [data-mjx-error]').map(e => e.textContent),
        broken: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src),
        mute: all('.cell_output img').filter(i => (i.alt || '').length < 12).map(i => i.src),
        page: light(document.body, 'backgroundColor'),
        text: all('article p').slice(0, 1).map(e => light(e, 'color')),
        maths: all('article mjx-container').slice(0, 1).map(e => light(e, 'color')),
        cells: all('div.cell_input').slice(0, 1).map(e => light(e, 'backgroundColor')),
        figures: all('.cell_output img').map(e => light(e, 'backgroundColor')),
    };
})()"""


@pytest.fixture(scope="module")
def seen(tab, address, site):
    """What each page looks like: facts[page][mode]; pictures of some lie in docs/_build/pictures.

    Every page is loaded once, then made narrow, then dark.
    """
    pictures, facts = site.parent / "pictures", {}
    pictures.mkdir(exist_ok=True)
    for path in sorted(p for p in site.rglob("*.html") if p.name != "search.html"):
        page = path.relative_to(site).as_posix()
        tab.requests.clear()
        tab.complaints.clear()
        tab.size(1440, 900)
        tab.go(f"{address}/{page}")
        modes = {}
        for mode in ("light", "phone", "dark"):
            tab.size(*((390, 844) if mode == "phone" else (1440, 900)), phone=mode == "phone")
            tab.scheme("dark" if mode == "dark" else "light")
            modes[mode] = tab.js(FACTS)
            if path.stem in ("index", "jumprelu"):
                tab.picture(pictures / f"{path.stem}-{mode}.png")
        tab.scheme("light")
        asked = [u for u in tab.requests if not u.startswith(("data:", "about:", "blob:"))]
        facts[page] = modes | {"hosts": {urlsplit(u).netloc for u in asked}, "complaints": [*tab.complaints]}
    return facts


def test_every_page_loads_without_complaint_from_this_host_alone(seen, address):
    for page, facts in seen.items():
        assert not facts["complaints"], (page, facts["complaints"])
        assert facts["hosts"] == {urlsplit(address).netloc}, (page, facts["hosts"])


def test_maths_is_set_wherever_there_is_some(seen):
    for page, facts in seen.items():
        facts = facts["light"]
        assert facts["set"] >= facts["asked"], f"{page}: {facts['set']} of {facts['asked']} formulas are set"
        assert not facts["wrong"], (page, facts["wrong"])
    assert sum(facts["light"]["set"] for facts in seen.values()) > 20


def test_every_picture_is_there_and_has_a_text(seen):
    for page, facts in seen.items():
        assert not facts["light"]["broken"], (page, facts["light"]["broken"])
        assert not facts["light"]["mute"], (page, facts["light"]["mute"])


def test_no_page_is_wider_than_the_screen(seen):
    for page, facts in seen.items():
        assert facts["light"]["width"] <= 1440, (page, facts["light"]["width"])
        assert facts["phone"]["width"] <= 390, f"{page} is {facts['phone']['width']} wide on a phone of 390"


def test_wide_tables_and_code_scroll_by_themselves_on_a_phone(seen):
    for page, facts in seen.items():
        assert not facts["phone"]["stuck"], (page, facts["phone"]["stuck"][0][:80])


def test_a_page_follows_its_reader_into_the_dark(seen):
    for page, facts in seen.items():
        light, dark = facts["light"], facts["dark"]
        assert light["page"] > 0.9 and dark["page"] < 0.15, page
        for what in ("text", "maths"):
            assert all(o < 0.45 for o in light[what]) and all(o > 0.5 for o in dark[what]), (
                page,
                what,
                dark[what],
            )
        assert all(o > 0.85 for o in light["cells"]) and all(o < 0.2 for o in dark["cells"]), page


def test_figures_lie_on_white_in_the_dark(seen):
    figures = [o for facts in seen.values() for o in facts["dark"]["figures"]]
    assert figures and min(figures) > 0.99


def test_search_finds_a_word_and_leads_to_it(tab, address):
    tab.size(1440, 900)
    tab.go(f"{address}/search.html?q=threshold")
    links = "[...document.querySelectorAll('#search-results ul.search li a')].map(a => a.href)"
    tab.wait(f"{links}.some(u => u.includes('jumprelu'))")  # the list grows while it is made
    links = tab.js(links)
    tab.go(links[0])
    assert "threshold" in tab.js("document.body.innerText").lower()


def test_search_without_a_match_says_so(tab, address):
    tab.go(f"{address}/search.html?q=zzzyyyxxx")
    tab.wait("/did not match/.test(document.body.innerText)")


def test_the_sidebar_has_every_notebook_in_the_order_of_the_contents(tab, address, root):
    tab.size(1440, 900)
    tab.go(f"{address}/index.html")
    links = tab.js(
        "[...document.querySelectorAll('.sidebar-tree a.reference')].map(a => a.getAttribute('href'))"
    )
    index = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))
    text = "".join("".join(c["source"]) for c in index["cells"]).partition("## Contents")[2]
    listed = re.findall(r"\]\(([\w/]+)\.ipynb\)", text)
    pages = {p.relative_to(root / "nbs").with_suffix("").as_posix() for p in (root / "nbs").rglob("*.ipynb")}
    assert set(listed) | {"index"} == pages
    assert links[: len(listed)] == [f"{name}.html" for name in listed]


def test_pages_read_the_same_from_disk(tab, site):
    tab.size(1440, 900)
    tab.requests.clear()
    tab.complaints.clear()
    tab.go((site / "1_method/jumprelu.html").as_uri())
    assert tab.js("document.querySelectorAll('mjx-container svg').length") > 0
    assert tab.js("getComputedStyle(document.querySelector('.lead')).fontSize") == "19.2px"
    assert not [u for u in tab.requests if urlsplit(u).netloc]
    assert not tab.complaints
