"""Sphinx configuration; `make docs` builds the pages into build/docs. Needs no network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "site"))

import rnn_ext

project = "rnn_ext"
author = "rnn_ext contributors"
copyright = "rnn_ext contributors, BSD-3-Clause"
version = release = rnn_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "complete",  # these four: docs/site
    "mathml",
    "repository",
    "signatures",
]
html_theme = "furo"
html_title = f"rnn_ext {release}"
html_static_path = ["site/static"]
html_css_files = ["equations.css"]
html_show_copyright = False
html_copy_source = False

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # README's sections start at level 2 below its title

smartquotes = False
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False

nitpicky = True
# Other projects' names are no links, so that a build needs no network; nor is code in backquotes.
nitpick_ignore_regex = [
    (r"py:obj", r".*"),
    (r"py:.*", r"(torch|numpy|np|collections|typing)(\..*)?"),
    (r"py:class", r"(Tensor|Device|ArrayLike|ndarray|.*\.Model|.*\.Tape)"),
]
