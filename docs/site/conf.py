"""Settings of Sphinx for the site; `build.py` runs it on the staged pages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import ncprior

project = "ncprior"
author = "The ncprior developers"
release = version = ncprior.__version__
html_title = "ncprior"
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "extension",
]
root_doc = "index"
smartquotes_action = "D"  # dashes; z' is a variable
nitpicky = True  # a reference that leads nowhere is a warning, and a warning fails the build
show_warning_types = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Other arguments", "params_style")]
default_role = "code"

html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_permalinks_icon = "#"
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5c8a", "color-brand-content": "#0b5c8a"},
    "dark_css_variables": {"color-brand-primary": "#7cc4ef", "color-brand-content": "#7cc4ef"},
    "navigation_with_keys": True,
    "top_of_page_buttons": [],
}
