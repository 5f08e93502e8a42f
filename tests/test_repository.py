"The repository itself: package and notebooks in step, notebooks clean, templates with their parameters, parameter files that load."
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from synthmr.generators.families import FAMILIES
from synthmr.params import load
from synthmr.privacy.gate import Audit
from synthmr.segmenters.training import FAMILIES as SEGMENTERS
from synthmr.studies.ensemble import EnsembleStudy
from synthmr.studies.evaluation import EvaluationRun
from synthmr.studies.pools import PooledRun
from synthmr.studies.ratio import RatioStudy
from synthmr.studies.runs import DataRun, GeneratorRun, SegmenterRun
from synthmr.studies.study import Study
from synthmr.ventricles.study import ImagesRun, MasksRun, SyntheticRun, VentricleStudy, VolumeSegmenterRun, VolumesRun

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
TEMPLATES = {run.report: run for run in (DataRun, GeneratorRun, PooledRun, EvaluationRun, Study, RatioStudy, EnsembleStudy, Audit,
                                          VolumesRun, MasksRun, ImagesRun, SyntheticRun, VolumeSegmenterRun, VentricleStudy)}   # the segmenter's report takes a pool, too
KINDS = {'data': DataRun, **dict.fromkeys(FAMILIES, GeneratorRun), **dict.fromkeys(SEGMENTERS, SegmenterRun), 'study': Study, 'ratio': RatioStudy, 'ensemble': EnsembleStudy}

def cells(path: Path) -> list[dict]:
    "The cells of a notebook, sources joined."
    return [{**c, 'source': ''.join(c['source'])} for c in json.loads(path.read_text(encoding='utf-8'))['cells']]

@pytest.fixture(scope='module')
def clean_copy(tmp_path_factory) -> Path:
    "The repository's notebooks in another folder, exported and cleaned there."
    copy = tmp_path_factory.mktemp('copy')
    for name in ('nbs', 'settings.ini', 'README.md', 'pyproject.toml'):
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copy)(ROOT/name, copy/name)
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True, capture_output=True)
    return copy

def test_package_is_in_step_with_the_notebooks(clean_copy):
    made = {p.relative_to(clean_copy/'synthmr') for p in (clean_copy/'synthmr').rglob('*.py')}
    kept = {p.relative_to(ROOT/'synthmr') for p in (ROOT/'synthmr').rglob('*.py')}
    assert made == kept
    assert made and [str(p) for p in made if not filecmp.cmp(clean_copy/'synthmr'/p, ROOT/'synthmr'/p, shallow=False)] == []

def test_notebooks_are_clean(clean_copy):
    assert [str(p.relative_to(ROOT)) for p in NOTEBOOKS if p.read_text() != (clean_copy/p.relative_to(ROOT)).read_text()] == []

def test_pages_of_the_paper_do_not_begin_with_code():
    "Each cell of theirs is folded or left out."
    bare = [(p.name, ''.join(c['source'])[:60]) for p in NOTEBOOKS if p.parent.name == 'paper' for c in cells(p) if c['cell_type'] == 'code' and not {'hide-input', 'remove-input'} & {*c['metadata'].get('tags', ())}]
    assert bare == []

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_holds_no_error(path):
    assert [o['evalue'] for c in cells(path) for o in c.get('outputs', []) if o['output_type'] == 'error'] == []

@pytest.mark.parametrize('name', TEMPLATES)
def test_template_has_its_parameters_and_no_output(name):
    "Without the tag papermill would run with the defaults; a name that the model lacks would never arrive."
    template = cells(ROOT/'nbs'/'reports'/f'{name}.ipynb')
    tagged = [c for c in template if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and not any(c.get('outputs') for c in template)
    names = [target.id for node in ast.parse(tagged[0]['source']).body for target in node.targets]
    assert sorted(names) == sorted(TEMPLATES[name].model_fields)

def test_every_template_is_known():
    assert {p.stem for p in (ROOT/'nbs'/'reports').glob('*.ipynb')} == set(TEMPLATES)

@pytest.mark.parametrize('path', sorted((ROOT/'params').rglob('*.yaml')), ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_parameter_file_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    load(VentricleStudy if path.parent.name == 'ventricles' else KINDS[path.stem], path)

def test_the_package_does_not_import_its_development_tools():
    found = {p.name for p in (ROOT/'synthmr').rglob('*.py') if p.name != '_modidx.py' and re.search(r'^\s*(from|import) (nbdev|fastcore)\b', p.read_text(), re.M)}
    assert found == set()

def test_the_lock_pins_every_requirement():
    settings = (ROOT/'settings.ini').read_text()
    wanted = {re.split('[<>=]', word)[0].lower() for key in ('requirements', 'dev_requirements') for word in re.search(rf'^{key} = (.*)$', settings, re.M)[1].split()}
    pinned = dict(line.split('==') for line in (ROOT/'requirements.lock').read_text().split())
    assert wanted <= {name.lower() for name in pinned} and pinned['torch'] == '2.13.0'


def test_hooks_before_a_commit_pass_on_what_is_committed(tmp_path):
    "As after `git clone` and `pre-commit run --all-files`: notebooks clean, package in step, no careless code."
    clone = tmp_path/'clone'
    subprocess.run(['git', 'clone', '--quiet', ROOT, clone], check=True)
    shutil.copy(ROOT/'.pre-commit-config.yaml', clone)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(['pre-commit', 'run', '--all-files'], cwd=clone, capture_output=True, text=True, env={**os.environ, 'PATH': path, 'PRE_COMMIT_HOME': str(tmp_path/'cache')})
    assert done.returncode == 0 and done.stdout.count('Passed') == 3, done.stdout + done.stderr

def test_what_the_workflow_calls_exists():
    import yaml
    jobs = yaml.safe_load((ROOT/'.github'/'workflows'/'pages.yml').read_text())['jobs']
    called = [step['run'] for step in jobs['build']['steps'] if 'run' in step]
    targets = re.findall(r'^([a-z]+):', (ROOT/'Makefile').read_text(), re.M)
    assert called and all(c.split()[0] == 'make' and c.split()[1] in targets for c in called)
    assert '_docs/html' in [step['with']['path'] for step in jobs['build']['steps'] if 'path' in step.get('with', {})]

def test_readme_says_what_the_result_files_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT/'nbs'/'_site')
    import readme
    text, found = (ROOT/'README.md').read_text(encoding='utf-8'), readme.shown(ROOT/'results')
    assert readme.with_answer(text, found) == text
    assert (found.folder/'answer.svg').is_file() and 'SIMULATED' in readme.answer(found)
