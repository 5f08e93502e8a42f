"Sphinx configuration of the published site; `build.py` writes the sources."
from configparser import ConfigParser
from pathlib import Path

_settings = ConfigParser(delimiters=['='])
_settings.read(Path(__file__).parents[2]/'settings.ini', encoding='utf-8')
_s = _settings['DEFAULT']

project, author, release = _s['title'], _s['author'], _s['version']
copyright = _s['copyright']
extensions = ['myst_nb', 'sphinx.ext.mathjax']
html_theme = 'furo'
html_title = 'SynthMR'
html_show_sourcelink = False
nb_execution_mode = 'off'       # what the notebooks hold was executed and is shown as it is
nb_merge_streams = True
nb_mime_priority_overrides = [('html', 'application/vnd.jupyter.widget-view+json', None)]  # a widget is dead on a page; its picture is not
nb_output_stderr = 'remove'     # progress bars
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 3
