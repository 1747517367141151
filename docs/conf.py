"""Settings of the book (``make book``): the executed notebooks as a site that needs no server and no network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # pages.py

project = "clipad"
author = "the clipad authors"
html_title = "clipad: CLIP-AD step by step"
extensions = ["myst_nb", "sphinx-mathjax-offline", "pages"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

# --- notebooks: executed beforehand, never here ---
nb_execution_mode = "off"
nb_custom_formats = {".ipynb": "pages.as_read"}
nb_merge_streams = True
nb_output_stderr = "remove"
nb_ipywidgets_js = {}  # no manager of a CDN: what lives without a kernel brings its own script
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
# Links out of the notebooks (to ../METHOD.md and the like) lead to files that are not pages here.
suppress_warnings = ["mystnb.unknown_mime_type", "myst.xref_missing", "myst.header"]

# --- look ---
html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search stands in the side bar
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_copy_source = True
html_show_sphinx = False
html_show_copyright = False
html_show_search_summary = False  # a page opened from a file may not fetch others
html_context = {"default_mode": "auto"}
