"The site: notebooks become pages without warnings, without directives."
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def test_site_builds_without_warnings_and_shows_no_directives(tmp_path):
    done = subprocess.run([sys.executable, ROOT/'nbs'/'_site'/'build.py', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {p.relative_to(tmp_path/'html').as_posix(): p.read_text(encoding='utf-8') for p in (tmp_path/'html').rglob('*.html')}
    chapters = [p.relative_to(ROOT/'nbs').with_suffix('.html').as_posix() for p in (ROOT/'nbs').rglob('[0-9]*.ipynb') if 'reports' not in p.parts and '.ipynb_checkpoints' not in p.parts]
    assert set(chapters) | {'index.html'} <= set(pages)
    assert [name for name, text in pages.items() if '#| ' in text or 'default_exp' in text] == []
    assert all(f'href="{chapter}"' in pages['index.html'] for chapter in chapters)
    assert [name for name in chapters if 'Traceback' in pages[name]] == []
    assert [name for name, text in pages.items() if 'require.min.js' in text or 'widget-view' in text] == []     # what dead widgets would bring in
