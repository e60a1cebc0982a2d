"""The documentation as a site, made by `make docs`.

Its source is the whole repository, so that README and docs/*.md are pages as they are, and their links the same as on
GitHub. A link to a page, heading or file that is not there is an error.
"""

import zo_mlx

project = "zo-mlx"
version = release = zo_mlx.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
root_doc = "docs/site/index"
include_patterns = ["*.md", "docs/*.md", "docs/site/*.rst", "examples/**README.md"]
suppress_warnings = ["docutils"]  # the help texts of mlx-lm's flags are no reStructuredText

html_theme = "furo"
html_title = f"zo-mlx {version}"
html_extra_path = ["root"]  # index.html
html_show_copyright = html_copy_source = False

myst_heading_anchors = 3  # named as GitHub names them
default_role = "code"  # `this`, in docstrings and help texts
smartquotes = False  # they would change what is to be typed
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
