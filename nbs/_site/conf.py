"Sphinx configuration of the published site; `build.py` writes the sources."
import sys
from configparser import ConfigParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
_parser = ConfigParser(delimiters=['='])
_parser.read(Path(__file__).parents[2]/'settings.ini', encoding='utf-8')
settings = _parser['DEFAULT']

project, author, release = settings['title'], settings['author'], settings['version']
copyright = settings['copyright']
extensions = ['myst_nb', 'mathml']
html_math_renderer = 'mathml'
html_theme = 'furo'
html_favicon = 'static/favicon.svg'
html_title = 'SynthMR'
html_static_path = ['static']
html_css_files = ['site.css']
html_theme_options = {'footer_icons': [{'name': 'Repository', 'url': settings['git_url'], 'html': 'repository', 'class': ''}]}
html_show_sourcelink = False
html_copy_source = False
add_module_names = False
python_use_unqualified_type_names = True
nb_execution_mode = 'off'       # what the notebooks hold was executed and is shown as it is
nb_merge_streams = True
nb_mime_priority_overrides = [('html', 'application/vnd.jupyter.widget-view+json', None)]  # a widget is dead on a page; its picture is not
nb_output_stderr = 'remove'     # progress bars
nb_render_markdown_format = 'myst'
nb_code_prompt_show = nb_code_prompt_hide = 'code'
nb_ipywidgets_js = {}           # nothing from elsewhere
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 3
