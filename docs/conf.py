"""Sphinx's settings: `make docs` builds these pages into build/docs/. Warnings are errors there."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hvd_accordion

project = "hvd_accordion"
author = "The hvd_accordion developers"
copyright = author
version = release = hvd_accordion.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
pygments_style, pygments_dark_style = "default", "monokai"  # diffs in red and green
html_title = f"hvd_accordion {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False

myst_enable_extensions = ["attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

default_role = "literal"  # `name` in a docstring is code
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the signature's defaults say more to a reader than unions of types
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!hvd_accordion).*")]  # bases and types of other libraries

logging.getLogger("tensorflow").setLevel(logging.ERROR)
