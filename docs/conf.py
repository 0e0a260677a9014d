"Sphinx settings. The pages are in docs/_build/src: `nbtool.py stage` writes them from the notebooks."

from pathlib import Path

import mathjax
from fastcore.foundation import Config

here = Path(__file__).parent
cfg = Config(here.parent, "settings.ini")

project, author, release = cfg.title, cfg.author, cfg.version
copyright = cfg.copyright

extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["notebooks"]
nb_execution_mode = "off"  # pages show the outputs that are stored in the notebooks
nb_merge_streams = True
nb_code_prompt_show = "Show the code"  # of imports and of plots, which are folded
nb_code_prompt_hide = "Hide the code"
nb_render_markdown_format = "myst"  # tables and formulas in outputs are read as in the text
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
numfig = True
numfig_secnum_depth = 0
math_numfig = False  # equations are counted page by page
math_eqref_format = "Eq. {number}"
suppress_warnings = ["myst.header"]  # an exported name is always an H3

html_theme = "furo"
html_theme_options = {"navigation_with_keys": True, "footer_icons": []}
html_title = cfg.title
html_favicon = str(here / "_static" / "gate.svg")
html_logo = html_favicon
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_use_index = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
copybutton_exclude = ".linenos, .gp, .go"

# MathJax as one local file: pages read the same with no network, from disk or from a server.
mathjax_file = Path(mathjax.__file__).parent / "static/mathjax/es5/tex-svg-full.js"
mathjax_path = mathjax_file.name
mathjax3_config = {"svg": {"fontCache": "local"}}
html_static_path = [str(here / "_static"), str(mathjax_file)]
