"""Build the site, the living paper as HTML: pages of the paper, chapters, executed reports, reference, bibliography.

    python nbs/_site/build.py [OUT]     OUT is _docs where it is not given

Pages of the paper are executed, so that they say what the result files at hand say; chapters and reports show the outputs that they hold.
"""
import re
import sys
from pathlib import Path
from shutil import copy, rmtree

from conf import settings
from pages import Pages, commits, execute, report_head, template_of
from reference import index, modules
from reference import page as reference_page
from references import page as bibliography
from references import read
from sphinx.cmd.build import build_main

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHAPTERS = {'': 'Foundations', 'data': 'Data', 'generators': 'Generators', 'segmenters': 'Segmenters', 'metrics': 'Metrics', 'studies': 'Studies', 'privacy': 'Privacy', 'ventricles': 'Ventricles'}

def toctree(
    caption: str,       # heading in the side bar
    pages: list[Path],  # relative to the page that it stands in
) -> str:
    "A table of contents in MyST, seen in the side bar only."
    return '\n'.join(['```{toctree}', *([f':caption: {caption}'] if caption else []), ':maxdepth: 1', ':hidden:', '', *(str(p.with_suffix('')) for p in pages), '```', ''])

def write_reports(pages: Pages, folder: Path):
    "Every executed report of a folder of results, its tables and parameters, and a page that lists them."
    reports, lines = sorted(folder.glob('*.ipynb')), []
    place = folder.relative_to(ROOT)
    (pages.source/place).mkdir(parents=True, exist_ok=True)
    for file in [*folder.glob('*.csv'), *folder.glob('*.yaml')]: copy(file, pages.source/place)
    for report in reports:
        pages.write(report, report.relative_to(ROOT), report_head(report, ROOT, settings['git_url']), fold=True)
        template = template_of(report)
        links = ' '.join(f'[{suffix[1:]}]({report.stem}{suffix})' for suffix in ('.yaml', '.csv') if report.with_suffix(suffix).is_file())
        lines.append((template, f"| [{report.stem}]({report.name}) | [{template}](../../templates/{template}.ipynb) | {links} | {', '.join(commits(report, settings['git_url']))} |"))
    order = ['comparison', 'ratio', 'ensemble', 'prepare', 'generator', 'evaluation']
    lines.sort(key=lambda l: order.index(l[0]) if l[0] in order else len(order))
    pages.text(f'{place}/index.md', '\n'.join([f'# Reports: {folder.name}', '', f'{len(reports)} executed reports: what ran, with the parameters that it took and the rows that it wrote.', '', '| report | template | files | commit |', '|---|---|---|---|',
                                               *(text for _, text in lines), '', toctree('', [Path(r.name) for r in reports])]))

def write_reference(pages: Pages, exported: dict[str, list[str]]):
    "The reference: a page a module, and one that lists them."
    lines = ['# Reference', '', '> Every module, as its notebook exports it. Names in the text of chapters lead here.', '', '| module | |', '|---|---|']
    for module, names in exported.items():
        path = ROOT/Path(*module.split('.')).with_suffix('.py')
        text = path.read_text()
        chapter = re.search(r'File to edit: [./]*(nbs/\S+\.ipynb)', text)[1].removeprefix('nbs/')
        made = reference_page(module, names, path, f'../{chapter}', f"{settings['git_url']}/blob/{settings['branch']}/{path.relative_to(ROOT).as_posix()}")
        pages.text(f'reference/{module}.md', made)
        lines.append(f"| [`{module}`]({module}.md) | {re.search(r'^> (.*)$', made, re.M)[1]} |")
    pages.text('reference/index.md', '\n'.join([*lines, '', toctree('', [Path(f'{m}.md') for m in exported])]))

def build(out: Path) -> int:
    "Write the sources and run Sphinx; returns its exit code, 0 for a site without warnings."
    source = out/'source'
    rmtree(source, ignore_errors=True)
    exported, works = modules(ROOT/'synthmr'), read(ROOT/'nbs'/'references.bib')
    pages, contents = Pages(ROOT, source, index(exported), works), []
    paper = sorted((ROOT/'nbs'/'paper').glob('[0-9]*.ipynb'))
    executed = execute([ROOT/'nbs'/'index.ipynb', *paper])
    for page in paper: pages.write(page, page.relative_to(ROOT/'nbs'), executed=executed[page])
    contents.append(toctree('The paper', [p.relative_to(ROOT/'nbs') for p in paper]))
    for folder, caption in CHAPTERS.items():
        chapters = sorted((ROOT/'nbs'/folder).glob('[0-9]*.ipynb'))
        for chapter in chapters: pages.write(chapter, chapter.relative_to(ROOT/'nbs'))
        if chapters: contents.append(toctree(caption, [p.relative_to(ROOT/'nbs') for p in chapters]))
    templates = sorted((ROOT/'nbs'/'reports').glob('*.ipynb'))
    for template in templates: pages.write(template, Path('templates')/template.name)
    pages.text('templates/index.md', '# Templates\n\n> What papermill executes: parameters, calls, tables, figures.\n\n' + '\n'.join(f'- [{t.stem}]({t.name})' for t in templates) + '\n\n' + toctree('', [Path(t.name) for t in templates]))
    results = [f for f in sorted((ROOT/'results').glob('*')) if f.is_dir() and any(f.glob('*.ipynb'))]
    for folder in results: write_reports(pages, folder)
    contents.append(toctree('Reports', [*(f.relative_to(ROOT)/'index' for f in results), Path('templates/index')]))
    write_reference(pages, exported)
    pages.text('bibliography.md', bibliography(works))
    contents.append(toctree('Reference', [Path('reference/index'), Path('bibliography')]))
    pages.write(ROOT/'nbs'/'index.ipynb', Path('index.ipynb'), tail='\n'.join(contents), executed=executed[ROOT/'nbs'/'index.ipynb'])
    for unknown in pages.unknown: print(f'not in nbs/references.bib: {unknown}', file=sys.stderr)
    code = build_main(['-q', '-W', '--keep-going', '-j', '2', '-b', 'html', '-c', str(HERE), '-d', str(out/'doctrees'), str(source), str(out/'html')]) or len(pages.unknown)
    print(f"{'built' if code == 0 else 'built with warnings'}: {out/'html'/'index.html'}")
    return min(code, 1)

if __name__ == '__main__': sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'_docs').resolve()))
