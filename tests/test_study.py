"A study end to end: papermill reports through Snakemake, nothing done twice, a touched parameter reruns what depends on it."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from tiny import DATA

from synthmr.params import load
from synthmr.studies.study import Study, all_runs

ROOT = Path(__file__).resolve().parents[1]
GENERATOR = {'kind': 'diffusion', 'process': 'edm', 'channels': 8, 'multipliers': [1], 'blocks': 1, 'attention': [], 'patch': 2, 'sampler': 'dpm_solver', 'sampling_steps': 4,
             'training': {'kimg': 0.5, 'batch_size': 16}}
SEGMENTER = {'kind': 'unet', 'levels': 3, 'filters': 8, 'optimiser': 'adamw', 'learning_rate': 0.01, 'validate_every': 0.5, 'training': {'kimg': 1.5, 'batch_size': 8}}
STUDY = {'data': DATA, 'generators': [{'data': DATA, 'generator': GENERATOR, 'images': 40}], 'segmenters': [{'data': DATA, 'segmenter': SEGMENTER}], 'augmentation': [True], 'seeds': [0],
         'evaluation': {'memorization': {'percentile': 90}, 'fidelity': [{'replicates': 10}]}}

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder in which studies run, as a user without the repository has it."
    folder = tmp_path_factory.mktemp('study')
    (folder/'params').mkdir(); (folder/'settings.ini').touch()      # so that results and artefacts stay here
    return folder

def run(place, study, *arguments) -> subprocess.CompletedProcess:
    "`synthmr study` on a study, in the folder."
    (place/'study.yaml').write_text(yaml.safe_dump(study))
    environment = {k: v for k, v in os.environ.items() if k != 'SYNTHMR_HOME'}
    return subprocess.run([Path(sys.executable).with_name('synthmr'), 'study', 'study.yaml', *arguments], cwd=place, env=environment, capture_output=True, text=True)

@pytest.fixture(scope='module')
def done(place):
    "The tiny study, run once."
    finished = run(place, STUDY)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished

def test_it_ends_with_the_table_and_the_page(place, done):
    assert 'relative Dice' in done.stdout and 'SIMULATED' in done.stdout and 'diffusion only' in done.stdout
    page = Path(done.stdout.strip().splitlines()[-1])
    text = page.read_text()
    assert page.suffix == '.html' and 'data:image/png;base64' in text and 'relative Dice' in text
    for wanted in [*(f'Table {n}' for n in range(2, 8)), *(f'Figure {n}' for n in range(1, 5)), 'Published beside reproduced']: assert re.search(rf'<h2[^>]*>[^<]*{wanted}', text), wanted

def test_every_report_has_figures_rows_and_parameters(place, done):
    reports = sorted((place/'results'/'tiny').glob('*.ipynb'))
    assert len(reports) == 1 + 1 + 3 + 1 + 1
    for report in reports:
        cells = json.loads(report.read_text())['cells']
        outputs = [o for c in cells for o in c.get('outputs', [])]
        assert any({'image/png', 'image/svg+xml'} & set(o.get('data', {})) for o in outputs) and not any(o['output_type'] == 'error' for o in outputs)
        assert len(pd.read_csv(report.with_suffix('.csv'))) > 0 and yaml.safe_load(report.with_suffix('.yaml').read_text())

def test_rows_know_their_run(place, done):
    rows = pd.concat([pd.read_csv(p) for p in (place/'results'/'tiny').glob('unet-*.csv')])
    assert set(rows.mixture) == {'real', 'synthetic', 'both'} and set(rows['class']) == {'NCR/NET', 'ED', 'ET'} and rows.subject.nunique() == 2
    assert {'run', 'dataset', 'segmenter', 'generator', 'augmentation', 'seed', 'commit', 'dirty', 'device', 'versions', 'data', 'seconds', 'peak_memory_mb'} <= set(rows.columns)
    assert rows.data.nunique() == 1 and rows.versions.str.contains('torch=').all() and (rows.seconds > 1).all() and (rows.peak_memory_mb > 100).all()

def stamps(place) -> dict[str, int]: return {p.name: p.stat().st_mtime_ns for p in (place/'results'/'tiny').glob('*') if p.suffix in ('.csv', '.ipynb', '.html')}

def test_again_does_nothing(place, done):
    before = stamps(place)
    again = run(place, STUDY)
    assert again.returncode == 0 and stamps(place) == before and 'Nothing to be done' in again.stderr
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]

def test_what_is_finished_is_not_done_again_for_a_report_that_is_missing(place, done):
    "Evaluations leave no artefact: that theirs is absent does not make them unfinished."
    table = next((place/'results'/'tiny').glob('comparison-*.csv'))
    aside = table.rename(table.with_suffix('.aside'))
    dry = run(place, STUDY, '--dry-run')
    aside.rename(table)
    reports = {r.name: r.report for r in all_runs(load(Study, place/'study.yaml'))}
    assert dry.returncode == 0 and {reports[n] for n in reports if f' {n}' in dry.stdout + dry.stderr} == {'comparison'}

def test_a_touched_parameter_reruns_what_depends_on_it(place, done):
    changed = json.loads(json.dumps(STUDY))
    changed['generators'][0]['images'] = 50
    dry = run(place, changed, '--dry-run')
    old = load(Study, place/'study.yaml')
    assert dry.returncode == 0
    runs = {r.name: r.report for r in all_runs(old)}
    planned = {name for name in runs if f' {name}' in dry.stdout + dry.stderr}
    assert sorted(runs[name] for name in planned) == ['comparison', 'evaluation', 'generator', 'segmenter', 'segmenter']     # not the data, not the real-only segmenter

def test_papermill_by_hand(place, done):
    data = place/'data.yaml'
    data.write_text(yaml.safe_dump(DATA))
    template = ROOT/'nbs'/'reports'/'prepare.ipynb'
    def papermill(*more): return subprocess.run([sys.executable, '-m', 'papermill', template, place/'out.ipynb', '-f', data, *more], cwd=place, capture_output=True, text=True)
    made = papermill()
    assert made.returncode == 0, made.stderr
    wrong = papermill('-p', 'resolutoin', '32')
    assert wrong.returncode != 0 and "resolutoin: unknown key; did you mean 'resolution'?" in wrong.stderr

def test_jobs_never_claim_more_cores_than_there_are(tmp_path):
    "Snakemake 9.10 to 9.16 gave a finished job's cores back twice (its issue 3913): after a first job, two of two cores ran together."
    cell = nbformat.v4.new_code_cell("rows = ''", metadata={'tags': ['parameters']})
    body = nbformat.v4.new_code_cell("import time\nstart = time.time()\ntime.sleep(1)\nopen(rows, 'w').write(f'{start} {time.time()}')")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, body], metadata={'kernelspec': {'name': 'python3', 'display_name': '', 'language': 'python'}}), tmp_path/'report.ipynb')
    plan = [{'name': n, 'report': 'prepare', 'template': str(tmp_path/'report.ipynb'), 'threads': 2, 'memory_mb': 1000, 'resources': {'runtime': 1}, 'planned': 0, **{k: str(tmp_path/f'{n}.{e}') for k, e in
             [('params', 'yaml'), ('notebook', 'ipynb'), ('rows', 'csv'), ('record', 'json')]}, 'needs': [str(tmp_path/f'{m}.csv') for m in needs]}
            for n, needs in [('first', ''), ('a', ['first']), ('b', ['first']), ('last', ['a', 'b'])]]
    for job in plan: Path(job['params']).write_text(yaml.safe_dump({'rows': job['rows']}))
    (tmp_path/'plan.json').write_text(json.dumps(plan))
    subprocess.run([sys.executable, '-m', 'snakemake', '--snakefile', ROOT/'synthmr'/'studies'/'Snakefile', '--directory', tmp_path, '--cores', '2', '--config',
                    f"plan={tmp_path/'plan.json'}"], check=True, capture_output=True)
    (_, a), (b, _) = sorted([float(x) for x in (tmp_path/f'{n}.csv').read_text().split()] for n in 'ab')
    assert a <= b
