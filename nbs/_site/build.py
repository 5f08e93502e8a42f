"""Build the site: notebooks and executed reports, through nbdev's processing, to HTML by Sphinx and MyST-NB.

    python nbs/_site/build.py [OUT]     OUT is _docs where it is not given
"""
import sys
from pathlib import Path
from shutil import rmtree

from execnb.nbio import read_nb, write_nb
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, populate_language, strip_ansi
from sphinx.cmd.build import build_main

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

def drop_module_name(cell):
    "The cell that only names the module says nothing to a reader."
    if cell.cell_type == 'code' and 'default_exp' in (cell.directives_ or {}): del cell['source']

PROCESSORS = [populate_language, strip_ansi, hide_line, filter_stream_, clean_magics, hide_, drop_module_name]
CHAPTERS = {'': 'Foundations', 'data': 'Data', 'generators': 'Generators', 'segmenters': 'Segmenters', 'metrics': 'Metrics', 'studies': 'Studies', 'privacy': 'Privacy'}

def process(
    notebook: Path, # as it stands in the repository
    page: Path,     # as Sphinx reads it
):
    "A notebook without directives, hidden cells and hidden lines; the code that it exports stays, for it is the paper's method."
    nb = NBProcessor(nb=read_nb(notebook), procs=PROCESSORS)
    nb.process()
    page.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb.nb, page)

def toctree(
    caption: str,       # heading in the side bar
    pages: list[Path],  # relative to the source folder
) -> str:
    "A table of contents in MyST."
    return '\n'.join(['```{toctree}', f':caption: {caption}', ':maxdepth: 1', ':hidden:', '', *(str(p.with_suffix('')) for p in pages), '```', ''])

def build(out: Path) -> int:
    "Write the sources and run Sphinx; returns its exit code, 0 for a page without warnings."
    source = out/'source'
    rmtree(source, ignore_errors=True)
    contents = []
    for folder, caption in CHAPTERS.items():
        pages = [p.relative_to(ROOT/'nbs') for p in sorted((ROOT/'nbs'/folder).glob('[0-9]*.ipynb'))]
        for page in pages: process(ROOT/'nbs'/page, source/page)
        if pages: contents.append(toctree(caption, pages))
    for folder in sorted(p for p in (ROOT/'results').glob('*') if p.is_dir()):
        reports = [p.relative_to(ROOT) for p in sorted(folder.rglob('*.ipynb'))]
        for report in reports: process(ROOT/report, source/report)
        if reports: contents.append(toctree(f'Reports: {folder.name}', reports))
    process(ROOT/'nbs'/'index.ipynb', source/'index.ipynb')
    front = read_nb(source/'index.ipynb')
    front.cells[-1].source = ''.join(front.cells[-1].source) + '\n\n' + '\n'.join(contents)
    write_nb(front, source/'index.ipynb')
    code = build_main(['-q', '-W', '--keep-going', '-b', 'html', '-c', str(HERE), '-d', str(out/'doctrees'), str(source), str(out/'html')])
    print(f"{'built' if code == 0 else 'built with warnings'}: {out/'html'/'index.html'}")
    return code

if __name__ == '__main__': sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'_docs').resolve()))
