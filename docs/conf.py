"""Sphinx's configuration of the documentation: `make docs` builds it into docs/_build/html."""

import sys
from pathlib import Path

from qlora_compile import __version__

sys.path.insert(0, str(Path(__file__).parent))
import generated

generated.write()

project = "qlora_compile"
release = version = __version__
copyright = "the authors of qlora_compile, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = "qlora_compile"
html_show_sphinx = False
