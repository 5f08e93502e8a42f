"The site, in a real browser: it builds without warnings, every link leads somewhere, search finds, nothing scrolls sideways, nothing comes from elsewhere."
import functools
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'nbs'/'_site'))

@pytest.fixture(scope='session')
def site(tmp_path_factory, worker_id) -> Path:
    "The folder of the site's HTML; built once, for all processes of pytest."
    base = tmp_path_factory.getbasetemp()
    out = (base if worker_id == 'master' else base.parent)/'site'
    with FileLock(f'{out}.lock'):
        if not (out/'done').is_file():
            done = subprocess.run([sys.executable, ROOT/'nbs'/'_site'/'build.py', out], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (out/'done').touch()
    return out

@pytest.fixture(scope='session')
def pages(site) -> dict[str, str]:
    return {p.relative_to(site/'html').as_posix(): p.read_text(encoding='utf-8') for p in (site/'html').rglob('*.html')}

@pytest.fixture
def address(site):
    "Where the site is served."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site/'html'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

@pytest.fixture
def page(browser, address):
    "A tab that fails where a page complains or asks for something from elsewhere."
    complaints, context = [], browser.new_context(viewport={'width': 1280, 'height': 900})
    tab = context.new_page()
    tab.on('console', lambda m: complaints.append(f'{tab.url}: {m.text}') if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda e: complaints.append(f'{tab.url}: {e}'))
    tab.on('request', lambda r: None if r.url.startswith((address, 'data:')) else complaints.append(f'{tab.url} asks for {r.url}'))
    tab.on('response', lambda r: complaints.append(f'{tab.url}: {r.status} for {r.url}') if r.status >= 400 else None)
    yield tab
    context.close()
    assert complaints == []

def test_every_notebook_is_a_page_without_directives(pages):
    chapters = [p.relative_to(ROOT/'nbs').with_suffix('.html').as_posix() for p in (ROOT/'nbs').rglob('[0-9]*.ipynb') if 'reports' not in p.parts and '.ipynb_checkpoints' not in p.parts]
    templates = [f'templates/{p.stem}.html' for p in (ROOT/'nbs'/'reports').glob('*.ipynb')]
    reports = [p.relative_to(ROOT).with_suffix('.html').as_posix() for p in (ROOT/'results').rglob('*.ipynb')]
    assert len(reports) > 100 and {*chapters, *templates, *reports, 'index.html', 'bibliography.html', 'search.html'} <= set(pages)
    assert [name for name, text in pages.items() if '#| ' in text or 'default_exp' in text] == []
    assert all(f'href="{chapter}"' in pages['index.html'] for chapter in chapters)
    assert [name for name in chapters if 'Traceback' in pages[name]] == []
    assert [name for name, text in pages.items() if 'require.min.js' in text or 'widget-view' in text] == []     # what dead widgets would bring in

def test_every_internal_link_and_picture_is_there(site, pages):
    from html.parser import HTMLParser
    class Links(HTMLParser):
        def __init__(self): super().__init__(); self.links, self.ids = set(), set()
        def handle_starttag(self, tag, attrs):
            given = dict(attrs)
            self.links |= {given[k] for k in ('href', 'src') if given.get(k)}
            self.ids |= {given['id']} if given.get('id') else set()
    found = {}
    for name, text in pages.items():
        found[name] = Links()
        found[name].feed(text)
    broken = []
    for name, parsed in found.items():
        for link in parsed.links:
            if link.startswith(('http:', 'https:', 'mailto:', 'data:', 'javascript:')): continue
            path, fragment = urldefrag(urljoin(f'http://site/{name}', link))
            target = unquote(path.removeprefix('http://site/')) or 'index.html'
            if not (site/'html'/target.partition('?')[0]).is_file(): broken.append(f'{name}: {link}')
            elif fragment and target in found and unquote(fragment) not in found[target].ids: broken.append(f'{name}: no {fragment} in {target}')
    assert sum(len(p.links) for p in found.values()) > 10_000 and broken == []

def test_a_report_links_to_its_template_parameters_rows_and_commit(pages):
    text = pages['results/small/comparison-d0100ff2.html']
    assert 'templates/comparison.html' in text and '/commit/' in text
    assert all(f'comparison-d0100ff2{suffix}"' in text for suffix in ('.yaml', '.csv'))

def test_the_front_page_says_what_the_result_files_say(site, pages):
    from synthmr.studies.findings import Findings, alone
    ours = alone(Findings(ROOT/'results'/'small'))
    for row in ours.itertuples(): assert f'{row.relative_dice:.2f} [{row.relative_dice_low:.2f}, {row.relative_dice_high:.2f}]' in pages['index.html']
    assert 'SIMULATED' in pages['index.html']

def test_committed_pages_say_what_the_result_files_say(site):
    "The outputs that readers of the repository see are those of a fresh run."
    def said(path):
        return [''.join(o['data'].get('text/markdown', o['data'].get('text/html', ''))) for c in json.loads(path.read_text())['cells'] for o in c.get('outputs', []) if 'data' in o]
    kept = sorted((ROOT/'nbs'/'paper').glob('[0-9]*.ipynb'))
    assert len(kept) >= 9
    import build
    fresh = build.execute([kept[4], kept[6]])       # the results and the ratio: the pages with most numbers
    for path, again in fresh.items():
        assert said(path) == [''.join(o['data'].get('text/markdown', o['data'].get('text/html', ''))) for c in again.cells for o in c.get('outputs', []) if 'data' in o], path.name

def test_search_finds_relative_dice_and_leads_there(page, address):
    page.goto(f'{address}/index.html')
    page.fill('input[name=q]', 'relative Dice')
    page.press('input[name=q]', 'Enter')
    page.wait_for_selector('#search-results li a')
    links = page.locator('#search-results li a')
    page.wait_for_function("document.querySelectorAll('#search-results li a').length > 5")
    texts = links.all_inner_texts()
    wanted = next(i for i, t in enumerate(texts) if t.strip() in ('Results', 'SynthMR'))
    assert wanted < 25
    links.nth(wanted).click()
    page.wait_for_load_state()
    assert 'relative dice' in page.inner_text('article').lower()

def test_every_kind_of_page_is_quiet_and_fits_a_phone(page, address, pages):
    "All pages of the paper, all chapters, and one report of each kind."
    kinds = {name.rsplit('/', 1)[1].split('-')[0]: name for name in pages if name.startswith('results/')}
    walked = [n for n in pages if not n.startswith(('results/', 'reference/', '_'))] + [*kinds.values(), 'reference/index.html', 'reference/synthmr.slices.html', 'reference/synthmr.studies.study.html']
    for name in walked:
        page.set_viewport_size({'width': 390, 'height': 844})
        page.goto(f'{address}/{name}')
        assert page.evaluate('document.documentElement.scrollWidth') <= 390, f'{name} scrolls sideways'
        missing = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        assert missing == [], name

def test_light_and_dark(browser, address):
    colours = []
    for scheme in ('light', 'dark'):
        context = browser.new_context(color_scheme=scheme)
        tab = context.new_page()
        tab.goto(f'{address}/index.html')
        colours.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    brightness = [sum(map(int, c.removeprefix('rgb(').rstrip(')').split(','))) for c in colours]
    assert brightness[0] > 600 > 200 > brightness[1]

def test_citations_are_linked_and_unknown_ones_are_named():
    import references
    works = references.read(ROOT/'nbs'/'references.bib')
    text, unknown = references.cite('As Ho et al. (2020, eq. 4) and `Ho et al. 2020` and Nobody et al. 1999 say.', works)
    assert text == 'As [Ho et al.](#ref-ho-2020) (2020, eq. 4) and `Ho et al. 2020` and Nobody et al. 1999 say.' and unknown == ['Nobody et al. 1999']

def test_names_in_prose_lead_to_the_reference():
    import reference
    known = reference.index({'synthmr.slices': ['SliceStore', 'batches'], 'synthmr.other': ['batches']})
    assert reference.refer('A `SliceStore` of `batches`, `slices.batches`: `no`.', known) == 'A {py:obj}`SliceStore <synthmr.slices.SliceStore>` of `batches`, {py:obj}`slices.batches <synthmr.slices.batches>`: `no`.'
