"""How the documentation is built: ``sphinx-build -W --keep-going -b html docs build/docs``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))
import openmm_cgflow

project = "openmm_cgflow"
author = "openmm_cgflow developers"
copyright = author
version = release = openmm_cgflow.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "source_tree",
    "settings_page",
]
exclude_patterns = ["build"]

# A role that names no setting, term or label is an error; names in docstrings need not have a page.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "openmm_cgflow"
html_show_copyright = html_show_sphinx = html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
pygments_style, pygments_dark_style = "tango", "monokai"
copybutton_exclude = ".linenos, .gp"
