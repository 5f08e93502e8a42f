"The command line: help that reads well, one line for a mistake, exit codes."
import subprocess
import sys
from pathlib import Path

import pytest

from synthmr.cli import main

ROOT = Path(__file__).resolve().parents[1]

def synthmr(*arguments, **kw) -> subprocess.CompletedProcess:
    "Run the installed command."
    return subprocess.run([Path(sys.executable).with_name('synthmr'), *map(str, arguments)], capture_output=True, text=True, **kw)

def test_help_names_every_verb():
    done = synthmr('--help')
    assert done.returncode == 0 and all(verb in done.stdout for verb in ('simulate', 'prepare', 'study'))

@pytest.mark.parametrize('text, key', [
    ('data: params/demo/data.yaml\ngenerators: [params/demo/diffusion.yaml]\nsegmenter: [params/demo/unet.yaml]', "segmenter: unknown key; did you mean 'segmenters'?"),
    ('data: params/demo/data.yaml\ngenerators: [params/demo/diffusion.yaml]\nsegmenters: [params/demo/unet.yaml]\nseeds: many', 'seeds: input should be a valid list'),
    ('data: params/demo/data.yaml\ngenerators: []\nsegmenters: [params/demo/unet.yaml]', 'generators: list should have at least 1 item'),
    ('data: params/nowhere.yaml\ngenerators: [params/demo/diffusion.yaml]\nsegmenters: [params/demo/unet.yaml]', 'params/nowhere.yaml: cannot be read'),
    ('data: {dataset: a, simulated: {subjects: -1}}\ngenerators: [params/demo/diffusion.yaml]\nsegmenters: [params/demo/unet.yaml]', 'data.simulated.subjects: input should be greater'),
])
def test_a_mistake_in_parameters_is_one_line_and_exit_code_2(text, key, tmp_path):
    file = tmp_path/'study.yaml'
    file.write_text(text)
    done = synthmr('study', file, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ''
    assert len(done.stderr.splitlines()) == 1 and str(file) in done.stderr and key in done.stderr

def test_unusable_data_is_one_line_and_exit_code_1(tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    assert main(['prepare', str(tmp_path/'empty'), str(tmp_path/'store')]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and str(tmp_path/'empty') in said

def test_simulate_then_prepare(tmp_path, capsys):
    assert main(['simulate', str(tmp_path/'cohort'), '--subjects', '2', '--spacing', '5', '--workers', '0']) == 0
    assert main(['prepare', str(tmp_path/'cohort'), str(tmp_path/'store'), '--resolution', '32', '--workers', '0']) == 0
    assert 'slices of 1 subjects' in capsys.readouterr().out
