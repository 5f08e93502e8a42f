"From notebooks to pages: without directives and hidden cells, with links to the reference, the bibliography and between pages."
import os
import re
from pathlib import Path

import nbformat
import pandas as pd
from execnb.nbio import read_nb, write_nb
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, populate_language, strip_ansi
from reference import refer
from references import cite
from tqdm import tqdm

def drop_module_name(cell):
    "The cell that only names the module says nothing to a reader."
    if cell.cell_type == 'code' and 'default_exp' in (cell.directives_ or {}): del cell['source']

PROCESSORS = [populate_language, strip_ansi, hide_line, filter_stream_, clean_magics, hide_, drop_module_name]

class Pages:
    "Writes the sources of a site."

    def __init__(
        self,
        root: Path,     # the repository
        source: Path,   # what Sphinx reads
        known: dict,    # names of the reference
        works: dict,    # the bibliography
    ):
        self.root, self.source, self.known, self.works, self.unknown = root, source, known, works, []

    def prose(self, text: str, here: Path, page: Path) -> str:
        "Markdown of a notebook in the folder `here` as it stands in a page: links to notebooks lead to pages, names to the reference, citations to the bibliography."
        def link(m):
            if '://' in m[1] or m[1].startswith('#'): return m[0]
            target = Path(os.path.normpath(here/m[1]))
            if not target.is_relative_to(self.root): return m[0]
            place = target.relative_to(self.root)
            place = Path('templates', *place.parts[2:]) if place.parts[:2] == ('nbs', 'reports') else Path(*place.parts[1:]) if place.parts[0] == 'nbs' else place
            return f'](<{os.path.relpath(self.source/place, page.parent)}>)' if ' ' in m[1] else f']({os.path.relpath(self.source/place, page.parent)})'
        text, unknown = cite(re.sub(r'\]\(([^)\s]+)\)', link, text), self.works)
        self.unknown += [f'{page.relative_to(self.source)}: {u}' for u in unknown]
        return refer(text, self.known)

    def write(
        self,
        notebook: Path,     # as it stands in the repository
        page: Path,         # relative to the source
        head: str='',       # Markdown above everything but the title
        tail: str='',       # and below
        executed=None,      # the notebook with its outputs, where they are not those of the file
        fold: bool=False,   # whether code is folded away: a report is read for what it shows
    ):
        "A notebook as a page; the code that it exports stays, for it is the paper's method."
        nb = NBProcessor(nb=executed or read_nb(notebook), procs=PROCESSORS)
        nb.process()
        page = self.source/page
        if fold: nb.nb.cells = folded(nb.nb.cells)
        markdown = [c for c in nb.nb.cells if c.cell_type == 'markdown']
        if head:
            title, _, rest = ''.join(markdown[0].source).partition('\n')
            markdown[0].source = f'{title}\n\n{head}\n{rest}'
        for cell in nb.nb.cells:
            if cell.cell_type == 'markdown': cell.source = self.prose(''.join(cell.source), notebook.parent, page)
            for output in cell.get('outputs', []):
                data = output.get('data', {})
                if 'text/markdown' in data: data['text/markdown'] = self.prose(''.join(data['text/markdown']), notebook.parent, page)
        if tail: markdown[-1].source += f'\n\n{tail}'
        page.parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb.nb, page)

    def text(self, page: str, markdown: str):
        "A page that no notebook stands behind."
        (self.source/page).parent.mkdir(parents=True, exist_ok=True)
        (self.source/page).write_text(markdown, encoding='utf-8')

def folded(cells: list) -> list:
    "Code folded away, cells that show nothing together with the next one."
    out, silent = [], []
    for i, cell in enumerate(cells):
        if cell.cell_type == 'code':
            silent.append(''.join(cell.source))
            if not cell.get('outputs') and i + 1 < len(cells) and cells[i + 1].cell_type == 'code': continue
            cell.source, cell.metadata, silent = '\n\n'.join(silent), {'tags': ['hide-input']}, []
        out.append(cell)
    return out

def execute(
    notebooks: list[Path],
) -> dict[Path, dict]:  # with outputs; raises nbclient's CellExecutionError, which shows the cell
    "Run notebooks one after the other in one kernel that is emptied in between: what they import is loaded once."
    manager, done = KernelManager(), {}
    manager.start_kernel()
    try:
        for path in tqdm(notebooks, desc='pages of the paper', unit='page'):
            nb = nbformat.read(path, as_version=4)
            nb.cells.insert(0, nbformat.v4.new_code_cell(f'%reset -f\nimport os; os.chdir({str(path.parent)!r})\n%matplotlib inline'))
            NotebookClient(nb, km=manager, timeout=600).execute()
            nb.cells.pop(0)
            nbformat.write(nb, temporary := path.with_name(f'.{path.name}.executed'))
            try: done[path] = read_nb(temporary)
            finally: temporary.unlink()
    finally: manager.shutdown_kernel(now=True)
    return done

def template_of(report: Path) -> str:
    "The name of the template that a report was executed from, which its first cell says."
    return re.search(r'nbs/reports/(\w+)\.ipynb', report.read_text(encoding='utf-8'))[1]

def report_head(
    report: Path,       # executed
    root: Path,
    repository: str,    # its address
) -> str:
    "Where a report comes from: template, parameters, rows, commit."
    template = template_of(report)
    parts = [f'Template: [{template}]({os.path.relpath(root/"nbs"/"reports"/template, report.parent)}.ipynb)']
    for words, file in (('parameters', report.with_suffix('.yaml')), ('rows', report.with_suffix('.csv'))):
        if file.is_file(): parts.append(f'[{words}]({file.name})')
    return f"*{' · '.join(parts)} · commit {', '.join(commits(report, repository)) or 'see the end'}*\n"

def commits(report: Path, repository: str) -> list[str]:
    "Links to the commits that made the rows of a report."
    rows = report.with_suffix('.csv')
    table = pd.read_csv(rows, usecols=lambda c: c == 'commit') if rows.is_file() else pd.DataFrame()
    return [f"[`{c[:7]}`]({repository}/commit/{c})" for c in table.commit.dropna().unique()] if 'commit' in table else []
