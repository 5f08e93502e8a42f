"The reader study: nothing unblinds a page, a browser keeps and resumes the answers, scores give back what is true."
import base64
import csv
import json
import re
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from synthmr.cli import main
from synthmr.slices import SliceStore, StoreWriter
from synthmr.studies.reader_report import score, scores_text
from synthmr.studies.reader_scores import COLUMNS, agreement, as_reading, exact_interval, published_reading, read_answers, read_key, simulated_reader, table8
from synthmr.studies.reader_study import REAL, ReaderStudyParams, key_summary, make_reader_study, page_hash, panels, sources, stated_hash

SUBJECTS = [f'BraTS20_Training_{i:03d}' for i in range(8)]

def store(folder: Path, seed: int, subjects: list[str] = (), images: int = 12, resolution: int = 16, **meta) -> SliceStore:
    "Slices of noise in a disc: of subjects, or as a generator writes them."
    rng, disc = np.random.default_rng(seed), np.hypot(*np.mgrid[-1:1:resolution*1j, -1:1:resolution*1j]) < 0.8
    with StoreWriter(folder, {'resolution': resolution, 'spacing': [1, 1, 1], **meta}) as writer:
        for name in subjects or ['all']:
            rows = [{'subject': name, 'z': i, 'tumour': i % 2, 'split': 'test' if name > SUBJECTS[3] else 'train'} if subjects else {'seed': seed, 'number': i, 'split': 'train', 'tumour': i % 2} for i in range(images)]
            writer.append(name, (rng.integers(20, 256, (images, 5, resolution, resolution)) * disc).astype(np.uint8), rows)
        return writer.finish()

@pytest.fixture(scope='module')
def stores(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp('hospital_stores')
    made = {REAL: store(folder/'ward_seven', 0, SUBJECTS), 'secret_gan': store(folder/'gan_samples', 1), 'copyist': store(folder/'diffusion_samples', 2)}
    return {name: s.path for name, s in made.items()}

def params(stores, **differs) -> ReaderStudyParams:
    return ReaderStudyParams(**{'real': str(stores[REAL]), 'synthetic': {n: str(p) for n, p in stores.items() if n != REAL}, 'images': 4, 'seed': 1, **differs})

def make(stores, page: Path, *more: str) -> dict:
    "A study of four images a source, by the command."
    assert main(['reader-study', 'make', str(page), '--real', str(stores[REAL]), '--synthetic', *(f'{n}={p}' for n, p in stores.items() if n != REAL), '--images', '4', '--seed', '1', *more]) == 0
    return read_key(page.with_suffix('.key.json'))

def embedded(page: Path) -> dict[str, str]:
    "Images of a page in base64 by their name, in the order in which they stand there."
    return dict(json.loads(re.search('<script type="application/json" id="study">(.*)</script>', page.read_text())[1])['images'])

def save(rows: pd.DataFrame, path: Path) -> Path: rows.to_csv(path, index=False); return path

# What is drawn

def test_sources_are_balanced_and_subjects_take_turns(stores, tmp_path):
    key = make_reader_study(params(stores, images=9), tmp_path/'a.html', progress=False)
    rows = pd.DataFrame(key['images'])
    real = rows[rows.source == REAL]
    assert rows.source.value_counts().to_dict() == {REAL: 9, 'secret_gan': 9, 'copyist': 9} and rows.image.is_unique and not rows.duplicated(['source', 'slice']).any()
    assert sorted(real.subject.value_counts()) == [2, 2, 2, 3] and set(real.subject) == set(SUBJECTS[4:])
    whole = pd.DataFrame(make_reader_study(params(stores, images=8, split=None, synthetic={'copyist': str(stores['copyist'])}), tmp_path/'b.html', progress=False)['images'])
    assert set(whole.subject.dropna()) == set(SUBJECTS)
    tumour = make_reader_study(params(stores, tumour=True), tmp_path/'c.html', progress=False)
    assert all(i['tumour'] > 0 for i in tumour['images']) and (key_summary(tumour).with_tumour == 1).all()

def test_the_seed_decides_wherever_the_stores_lie(stores, tmp_path):
    moved = {name: Path(shutil.copytree(path, tmp_path/f'{path.name}-elsewhere')) for name, path in stores.items()}
    one, again, other, new = (make_reader_study(params(s, seed=seed), tmp_path/f'{i}.html', progress=False) for i, (s, seed) in enumerate([(stores, 1), (moved, 1), (stores, 2), (stores, None)]))
    assert (tmp_path/'0.html').read_bytes() == (tmp_path/'1.html').read_bytes() and one['images'] == again['images']
    assert len({k['study'] for k in (one, other, new)}) == 3 and isinstance(new['parameters']['seed'], int)
    graded = make_reader_study(params(stores, graded=True), tmp_path/'graded.html', progress=False)
    assert graded['study'] != one['study']      # or the browser would mix their answers up

@pytest.mark.parametrize('differs, why', [({'images': 49}, 'are needed'), ({'split': 'validation'}, "0 slices of split 'validation'"), ({'images': 25, 'tumour': True}, 'with tumour')])
def test_too_few_slices_are_refused(stores, differs, why):
    with pytest.raises(ValueError, match=why): sources(params(stores, **differs))

def test_what_could_be_told_apart_or_lost_is_refused(stores, tmp_path, capsys):
    larger = store(tmp_path/'larger', 3, resolution=32)
    with pytest.raises(ValueError, match='different resolution.*ward_seven 16.*larger 32'): sources(params(stores, synthetic={'larger': str(larger.path)}))
    with pytest.raises(ValueError, match='a and b: the same images'): sources(params(stores, synthetic={'a': str(stores['copyist']), 'b': str(stores['copyist'])}))
    command = ['reader-study', 'make', str(tmp_path/'p.html'), '--real', str(stores[REAL]), '--synthetic', f"copyist={stores['copyist']}", '--images', '4']
    assert main(command) == 0 and main(command) == 1 and 'p.html: is there already' in capsys.readouterr().err
    (tmp_path/'p.html').unlink()
    assert main(command) == 1 and 'p.key.json: is there already' in capsys.readouterr().err     # the key of a study that may be under way
    for synthetic in ('copyist', 'real=x'):
        assert main([*command[:6], synthetic]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and 'synthetic' in said and not (tmp_path/'p.html').exists()
    assert main([*command[:6], f"copyist={tmp_path/'nowhere'}"]) == 1

# Blinding

def test_the_page_tells_nothing(stores, tmp_path):
    key = make(stores, tmp_path/'study.html')
    html, pictures = (tmp_path/'study.html').read_text(), embedded(tmp_path/'study.html')
    text = re.sub(r'"[A-Za-z0-9+/=]{60,}"', '', html)
    assert len(text) < 40_000 and len(pictures) == 12
    secrets = [*stores, *SUBJECTS, *(p.name for p in stores.values()), *map(str, stores.values()), *(str(s['fingerprint']) for s in key['sources'].values()), str(Path.home()), 'subject', 'BraTS', 'commit', '.npy', 'tumour']
    assert [s for s in secrets if s != REAL and s.lower() in text.lower()] == []
    for image in key['images']:
        file = base64.b64decode(pictures[image['image']])
        at, chunks = 8, []
        while at < len(file): chunks.append(file[at + 4:at + 8]); at += 12 + int.from_bytes(file[at:at + 4], 'big')
        assert set(chunks) == {b'IHDR', b'IDAT', b'IEND'} and at == len(file)
        picture = Image.open(BytesIO(file))
        assert picture.mode == 'L' and picture.size == (32, 32) and not picture.info
        kept = np.load(stores[image['source']]/'images.npy')[[image['slice']]]
        assert np.array_equal(np.asarray(picture), panels(kept)[0])

def test_order_and_names_are_independent_of_the_source(stores, tmp_path):
    "Over many seeds, the place and the name of a real image are those of any other."
    places, names = [], []
    for seed in range(60):
        key = make_reader_study(params(stores, seed=seed, images=4), tmp_path/f'{seed}.html', progress=False)
        order, of = list(embedded(tmp_path/f'{seed}.html')), {i['image']: i['source'] for i in key['images']}
        assert [i['image'] for i in key['images']] == order
        places += [order.index(i) for i in order if of[i] == REAL]; names += [sorted(order).index(i) for i in order if of[i] == REAL]
    for where in (places, names): assert stats.kstest((np.array(where) + 0.5)/12, 'uniform').pvalue > 1e-3

def test_the_hash_is_that_of_the_page(stores, tmp_path):
    key, html = make(stores, tmp_path/'study.html'), (tmp_path/'study.html').read_text()
    assert page_hash(html) == stated_hash(html) == key['page']
    assert page_hash(html.replace('Undo', 'undo')) != key['page']

# In a browser

class Reader:
    "A person before the page, who knows what is true."
    def __init__(self, page, key: dict, study: Path):
        self.page, self.truth, self.study = page, {i['image']: i['source'] for i in key['images']}, study
        self.name = {picture: name for name, picture in embedded(study).items()}
        self.errors, self.asked = [], []
        page.on('console', lambda m: self.errors.append(m.text) if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: self.errors.append(str(e)))
        page.on('request', lambda r: self.asked.append(r.url) if not r.url.startswith('data:') else None)

    def open(self): self.page.goto(self.study.as_uri()); return self
    def begin(self, name: str): self.page.fill('#reader', name); self.page.keyboard.press('Enter'); return self

    def sees(self, i: int) -> str:
        "Name of the image in sight, once the page's `i`-th is painted."
        self.page.wait_for_selector(f'#frame[data-painted="{i}"]')
        return self.name[self.page.get_attribute('#frame img', 'src').removeprefix('data:image/png;base64,')]

    def answer(self, start: int, stop: int, keys) -> dict[str, str]:
        "Press for each image what `keys` says of its source and number."
        said = {}
        for i in range(start, stop):
            name = self.sees(i)
            said[name] = keys(self.truth[name], i)
            for key in said[name]: self.page.keyboard.press(key)
        return said

    def saved(self, button: str, path: Path) -> Path:
        with self.page.expect_download() as download: self.page.click(button)
        download.value.save_as(path)
        return path

@pytest.fixture
def context(browser):
    context = browser.new_context(accept_downloads=True)
    yield context
    context.close()

def open_profile(browser, folder: Path):
    "A browser that keeps what it knows in a folder."
    return browser.browser_type.launch_persistent_context(folder, executable_path=shutil.which('chromium') or shutil.which('google-chrome'), args=['--no-sandbox'], accept_downloads=True)

def test_a_study_from_page_to_table(browser, stores, tmp_path, capsys):
    "Half the answers with an undo, the browser closed and opened again, the rest; scores are the truth that was acted."
    study = tmp_path/'study.html'
    key = make(stores, study)
    press = {REAL: 'r', 'secret_gan': 'ArrowLeft', 'copyist': 'ArrowRight'}             # the gan never deceives, the copyist always does
    first = open_profile(browser, tmp_path/'profile')
    reader = Reader(first.new_page(), key, study).open().begin('  A. B.,"=x ')
    said = reader.answer(0, 5, lambda source, i: [press[source]])
    shown = reader.sees(5)
    first.pages[-1].keyboard.press('s'); reader.sees(6)
    first.pages[-1].keyboard.press('Backspace')
    assert reader.sees(5) == shown and reader.page.inner_text('#count') == 'Image 6 of 12'
    said |= reader.answer(5, 6, lambda source, i: [press[source]])
    sixth = reader.sees(6)
    first.close()

    second = open_profile(browser, tmp_path/'profile')
    again = Reader(second.new_page(), key, study).open()
    assert again.page.input_value('#reader') == 'A. B.x' and again.page.inner_text('#begin') == 'Continue (6 of 12)'
    again.page.keyboard.press('Enter')
    assert again.sees(6) == sixth
    said |= again.answer(6, 12, lambda source, i: [press[source]])
    again.page.wait_for_selector('#done h1')
    file = again.saved('#done [data-save]', tmp_path/'answers.csv')
    second.close()
    assert reader.errors == again.errors == [] and {*reader.asked, *again.asked} == {study.as_uri()}

    rows = list(csv.DictReader(file.open()))
    assert tuple(rows[0]) == COLUMNS and [r['image'] for r in rows] == list(said) and [int(r['position']) for r in rows] == list(range(1, 13))
    assert {r['reader'] for r in rows} == {'A. B.x'} and {r['page'] for r in rows} == {key['page']} and all(r['confidence'] == '' and int(r['milliseconds']) > 0 for r in rows)
    assert [int(r['changes']) for r in rows] == [0]*5 + [1] + [0]*6 and [r['answered'] for r in rows] == sorted(r['answered'] for r in rows)

    capsys.readouterr()
    assert main(['reader-study', 'score', str(study.with_suffix('.key.json')), str(file), '--out', str(tmp_path/'scores')]) == 0
    printed = capsys.readouterr().out
    table = pd.read_csv(tmp_path/'scores'/'table8.csv').set_index('source')
    assert table.classified_real.to_dict() == {REAL: 4, 'secret_gan': 0, 'copyist': 4} and table.classified_synthetic.to_dict() == {REAL: 0, 'secret_gan': 4, 'copyist': 0}
    value = pd.read_csv(tmp_path/'scores'/'detection.csv').set_index('measure').value
    assert value.round(6).to_dict() == {'sensitivity': 0.5, 'specificity': 1.0, 'accuracy': round(8/12, 6), 'balanced accuracy': 0.75}
    assert np.isclose(table.p['secret_gan'], 2/70) and table.p['copyist'] == 1       # 2 / (8 choose 4)
    assert '| A. B.x | secret_gan | 0 | 4 | 0 % (0 to 60) |' in printed and 'INCOMPLETE' not in printed

    other = make_reader_study(params(stores, seed=5), tmp_path/'other.html', progress=False)
    assert main(['reader-study', 'score', str(tmp_path/'other.key.json'), str(file)]) == 1
    assert f"study {key['study']!r} is not that of the key, {other['study']!r}" in capsys.readouterr().err

def test_graded_answers_go_on_in_another_browser(browser, stores, tmp_path):
    study = tmp_path/'study.html'
    key = make(stores, study, '--graded')
    grades = {REAL: '5423', 'secret_gan': '1123', 'copyist': '5543'}                     # of the n-th image of a source; who cannot tell says real of real images
    seen = dict.fromkeys(grades, 0)
    def keys(source, i):
        grade = grades[source][seen[source]]; seen[source] += 1
        return [grade, *(['r' if source == REAL else 's'] if grade == '3' else [])]
    one, two = browser.new_context(accept_downloads=True), browser.new_context(accept_downloads=True)
    reader = Reader(one.new_page(), key, study).open().begin('C')
    reader.sees(0)
    for ignored in ('r', 's', 'ArrowLeft', '6', '0', 'Alt+1', 'Control+5'): reader.page.keyboard.press(ignored)
    reader.page.keyboard.press('3')
    assert 'If you had to choose?' in reader.page.inner_text('footer')
    reader.page.keyboard.press('Backspace')
    assert reader.page.locator('#answers button').count() == 5 and reader.page.inner_text('#count') == 'Image 1 of 12'
    reader.answer(0, 7, keys); eighth = reader.sees(7)
    reader.page.keyboard.press('Escape')
    assert '7 of 12' in reader.page.inner_text('#sofar')
    part = reader.saved('#pause [data-save]', tmp_path/'part.csv')
    one.close()

    other = Reader(two.new_page(), key, study).open()
    damaged = tmp_path/'damaged.csv'
    for change, why in ((lambda t: t.replace(key['study'], 'bbbbbbbb'), 'another study'), (lambda t: t.replace('image', 'picture', 1), 'not a file of answers'), (lambda t: '\n'.join([*t.split('\n')[:1], *t.split('\n')[2:]]), 'damaged')):
        damaged.write_text(change(part.read_text()))
        other.page.set_input_files('#load', damaged)
        other.page.wait_for_selector(f'#problem:has-text("{why}")')
    other.page.set_input_files('#load', part)
    assert other.sees(7) == eighth
    other.answer(7, 12, keys)
    other.page.wait_for_selector('#done h1')
    file = other.saved('#done [data-save]', tmp_path/'all.csv')
    two.close()
    assert reader.errors == other.errors == []
    assert file.read_text().startswith(part.read_text())

    found = score(key, read_answers(key, [file]), replicates=50)
    suspicion = {REAL: [1, 2, 5, 3], 'secret_gan': [6, 6, 5, 4], 'copyist': [1, 1, 2, 4]}
    pairs = [(s > r) + (s == r)/2 for s in suspicion['secret_gan'] + suspicion['copyist'] for r in suspicion[REAL]]
    assert np.isclose(found.detection.set_index('measure').value['AUC'], np.mean(pairs))
    with pytest.raises(ValueError, match='has not answered 5 of 12 images; --partial'): read_answers(key, [part])
    assert 'INCOMPLETE: 5 answers are missing' in scores_text(score(key, read_answers(key, [part], partial=True), replicates=50))

def test_every_reader_has_an_order_of_his_own(context, stores, tmp_path):
    key = make(stores, tmp_path/'study.html')
    page = context.new_page()
    page.goto((tmp_path/'study.html').as_uri())
    orders = [page.evaluate('name => orderOf(name).map(image => image[0])', name) for name in ('A', 'B', 'a')]
    assert orders[0] != orders[1] and orders[0] == orders[2] and sorted(orders[0]) == sorted(orders[1]) == sorted(i['image'] for i in key['images'])
    places = np.array([page.evaluate('name => orderOf(name).map(image => image[0])', f'reader {i}').index(key['images'][0]['image']) for i in range(120)])
    assert stats.kstest((places + 0.5)/12, 'uniform').pvalue > 1e-3

def test_time_runs_only_while_the_image_is_seen(context, stores, tmp_path):
    key = make(stores, tmp_path/'study.html')
    page = context.new_page()
    page.clock.install()
    reader = Reader(page, key, tmp_path/'study.html').open()
    page.clock.pause_at(pd.Timestamp.now().timestamp() + 60)
    reader.begin('T')
    def hide(hidden): page.evaluate("hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true}); document.dispatchEvent(new Event('visibilitychange')) }", hidden)
    def until(what):
        "Let time pass in small steps until the page says so: decoding and dialogs take real time."
        for _ in range(200):
            if page.evaluate(what): return
            page.clock.run_for(10); page.wait_for_timeout(5)
        raise AssertionError(what)
    def painted(i): until(f'document.querySelector("#frame").dataset.painted === "{i}" && since !== null')
    page.keyboard.press('r')                                    # not painted yet: no answer
    painted(0); page.clock.run_for(5000); hide(True); page.clock.run_for(60_000); hide(False)
    page.clock.run_for(2000); page.keyboard.press('p'); page.clock.run_for(60_000); page.click('#go'); until('since !== null')
    page.clock.run_for(1000); page.keyboard.press('r')
    painted(1); page.clock.run_for(3000); page.keyboard.press('u')      # the second image was looked at, too
    painted(0); page.clock.run_for(500); page.keyboard.press('r')
    painted(1); page.clock.run_for(4000); page.keyboard.press('s')
    painted(2); page.keyboard.press('Escape')
    first, second = list(csv.DictReader(reader.saved('#pause [data-save]', tmp_path/'t.csv').open()))
    assert 8500 <= int(first['milliseconds']) <= 8500 + 200 and 7000 <= int(second['milliseconds']) <= 7000 + 200 and (first['changes'], second['changes']) == ('1', '0')

def test_a_browser_that_keeps_nothing_says_so(context, stores, tmp_path):
    key = make(stores, tmp_path/'study.html')
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('denied', 'SecurityError') }})")
    reader = Reader(context.new_page(), key, tmp_path/'study.html').open()
    assert 'keeps nothing' in reader.page.inner_text('#start .warning >> nth=0')
    reader.begin('N').answer(0, 12, lambda source, i: ['r'])
    reader.page.wait_for_selector('#done h1')
    assert 'keeps nothing' in reader.page.inner_text('#done .warning') and len(reader.saved('#done [data-save]', tmp_path/'n.csv').read_text().splitlines()) == 13 and reader.errors == []

def test_two_windows_do_not_overwrite_each_other(context, stores, tmp_path):
    key = make(stores, tmp_path/'study.html')
    one, two = (Reader(context.new_page(), key, tmp_path/'study.html').open().begin('W') for _ in range(2))
    one.answer(0, 2, lambda source, i: ['r'])
    two.page.wait_for_selector('#elsewhere[open]')
    two.page.keyboard.press('s')
    one.answer(2, 3, lambda source, i: ['r'])
    one.sees(3)
    two.page.reload()
    assert two.page.inner_text('#begin') == 'Continue (3 of 12)'

def overlap(a: dict, b: dict) -> bool: return all(a[x] + a[size] > b[x] + 1 and b[x] + b[size] > a[x] + 1 for x, size in (('x', 'width'), ('y', 'height')))

@pytest.mark.parametrize('width, height', [(1280, 800), (390, 844), (844, 390)])
@pytest.mark.parametrize('graded', [False, True])
def test_the_page_fits_and_can_be_used_by_touch(browser, stores, tmp_path, width, height, graded):
    key = make(stores, tmp_path/'study.html', *(['--graded'] if graded else []))
    context = browser.new_context(viewport={'width': width, 'height': height}, has_touch=True)
    reader = Reader(context.new_page(), key, tmp_path/'study.html').open().begin('T')
    reader.sees(0)
    boxes = [b.bounding_box() for b in reader.page.locator('#answers button, #rest').all()]
    assert all(b['height'] >= 44 and b['x'] >= 0 and b['x'] + b['width'] <= width and b['y'] >= 0 and b['y'] + b['height'] <= height for b in boxes)
    image = reader.page.locator('#frame img').bounding_box()
    assert abs(image['width'] - image['height']) < 1 and image['width'] >= 0.75*min(width, height) and not any(overlap(image, b) for b in boxes)
    reader.page.tap('#answers button >> nth=0'); reader.sees(1)
    reader.page.tap('#undo'); reader.sees(0)
    assert reader.page.evaluate('document.documentElement.scrollWidth') <= width and reader.errors == []
    context.close()

# Scores

def test_files_that_do_not_fit_are_refused(stores, tmp_path, capsys):
    key = make(stores, tmp_path/'study.html')
    rows, place = simulated_reader(key, 'A', 1.0), str(tmp_path/'study.key.json')
    good = save(rows, tmp_path/'good.csv')
    capsys.readouterr()
    for change, why in ((rows.assign(page='sha256-0'), 'page'), (rows.assign(image=rows.image.replace(rows.image[0], 'zzzzzz')), "such as 'zzzzzz'"), (pd.concat([rows, rows[:3]]), 'answered 3 images twice'), (rows[:9], 'has not answered 3 of 12'),
                        (rows[:0], 'holds no answers'), (rows.assign(answer='maybe'), "'maybe'"), (rows.assign(milliseconds='?'), 'milliseconds'), (rows.assign(confidence=4), 'not graded')):
        bad = save(change, tmp_path/'bad.csv')
        assert main(['reader-study', 'score', place, str(bad)]) == 1
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and str(bad) in said and why in said
    for key_file, answers in ((str(good), good), (place, tmp_path/'study.html'), (place, tmp_path/'nowhere.csv')): assert main(['reader-study', 'score', key_file, str(answers)]) == 1
    assert main(['reader-study', 'score', place, str(good), str(good)]) == 1 and 'twice' in capsys.readouterr().err
    assert main(['reader-study', 'score', place, str(good)]) == 0 and main(['reader-study', 'score', place, str(save(rows[:9], tmp_path/'bad.csv')), '--partial']) == 0

def test_exact_intervals_are_scipys():
    for k, n in ((0, 7), (7, 7), (3, 10), (16, 100), (250, 500)):
        theirs = stats.binomtest(k, n).proportion_ci(method='exact')
        assert np.allclose(exact_interval(k, n), (theirs.low, theirs.high))

def test_readers_who_are_simulated_come_back(stores, tmp_path):
    "Each true sensitivity of two readers and two generators lies within an interval of 99.99 %."
    images = [{'image': f'{s}-{i}', 'source': s, 'subject': None} for s in (REAL, 'secret_gan', 'copyist') for i in range(1500)]
    key = {**make_reader_study(params(stores), tmp_path/'s.html', progress=False), 'images': images}
    files = [save(simulated_reader(key, name, {'secret_gan': 2.0, 'copyist': 0.0}, c, seed), tmp_path/f'{name}.csv') for name, c, seed in (('A', 0.5, 0), ('B', 1.0, 1))]
    r = as_reading(key, read_answers(key, files), 50)
    table = table8(r).set_index(['reader', 'source'])
    for (name, source), row in table.drop('all readers').iterrows():
        truth = stats.norm.cdf({'A': 0.5, 'B': 1.0}[name] - {REAL: 0, 'secret_gan': 2, 'copyist': 0}[source])
        low, high = exact_interval(row.classified_real, 1500, 0.9999)
        assert low <= truth <= high
    assert (table.p_holm[[('A', 'secret_gan'), ('B', 'secret_gan'), ('all readers', 'secret_gan')]] < 0.01).all()
    assert len(agreement(r)) == 1 and agreement(r).kind[0] == 'Cohen'

def test_the_published_reader_is_scored_as_printed():
    r = published_reading()
    table = table8(r).set_index('source')
    assert table.classified_real.to_dict() == {'real': 16, 'progressive_gan': 23, 'stylegan1': 14, 'stylegan2': 13, 'stylegan3': 18, 'diffusion': 16} and agreement(r).empty
    assert all(np.allclose(exact_interval(row.classified_real, 100), (row.low, row.high)) for row in table.itertuples())
