"""Sphinx: ``make docs`` builds the site; warnings are errors, and tutorials are executed."""

from mmadvmoe import __version__

project = 'mmadvmoe'
copyright = 'the authors of mmadvmoe'
release = version = __version__
html_theme = 'furo'
html_title = f'mmadvmoe {version}'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_heading_anchors = 4
# Links to files of the repository that are no pages; tests/test_readme.py follows them.
suppress_warnings = ['myst.xref_missing']
exclude_patterns = ['_build']
nb_execution_mode = 'force'
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True
# As pages are, so that tables are tables.
nb_render_markdown_format = 'myst'
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
autodoc_default_options = dict(members=True)
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
