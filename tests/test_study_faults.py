"What goes wrong in a study on one machine: a failing cell, a kernel that dies, everything killed, two studies at once. What was finished stays, what was begun goes on."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from tiny import generator, study

from synthmr.params import load
from synthmr.studies.jobs import read_record
from synthmr.studies.runs import GeneratorRun

SYNTHMR = str(Path(sys.executable).with_name('synthmr'))

@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder of a user's own, in which studies run."
    (tmp_path/'params').mkdir(); (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path); monkeypatch.delenv('SYNTHMR_HOME', raising=False)
    return tmp_path

def start(name: str, plan: dict, *arguments) -> subprocess.Popen:
    "Begin a study."
    Path(name).write_text(yaml.safe_dump(plan))
    return subprocess.Popen([SYNTHMR, 'study', name, '--cores', '2', *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def end(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err

def until(condition, seconds: float=120):
    "Wait for something; its value."
    limit = time.time() + seconds
    while time.time() < limit:
        if value := condition(): return value
        time.sleep(0.1)
    raise AssertionError('waited in vain')

def run_of(plan: dict) -> GeneratorRun:
    "The first generator of a study."
    Path('generator.yaml').write_text(yaml.safe_dump(plan['generators'][0]))
    return load(GeneratorRun, 'generator.yaml')

def record_of(run) -> Path: return Path('artifacts')/'tiny'/'jobs'/f'{run.name}.json'

def finished() -> dict[str, int]: return {p.name: p.stat().st_mtime_ns for p in Path('results/tiny').glob('*.csv')}

def test_a_cell_that_fails_stops_no_other(place):
    "A generator diverges: what does not need it is done, the comparison says what it lacks and why, and nothing finished is done again."
    wild = generator('stylegan2')
    wild['generator']['generator_rate'] = 1e30
    plan = study(generator('diffusion'), wild, mixtures=['real', 'synthetic'])
    code, out, err = end(start('study.yaml', plan))
    assert code == 1, err
    assert 'INCOMPLETE' in out and 'diffusion only' in out and 'TrainingError' in out and 'failed' in out and 'blocked' in out
    page = Path(out.strip().splitlines()[-1])
    assert '-incomplete' in page.name and 'TrainingError' in page.read_text()
    table = pd.read_csv(page.with_suffix('.csv'))
    assert set(table.mixture) == {'real', 'synthetic'} and set(table.generator.dropna()) == {'diffusion'} and not list(page.parent.glob('comparison-????????.csv'))
    before = finished()
    status = subprocess.run([SYNTHMR, 'status', 'study.yaml'], capture_output=True, text=True).stdout
    assert 'TrainingError' in status and 'stylegan2' in status and 'blocked' in status
    again, _, err = end(start('study.yaml', plan))
    assert again == 1
    after = finished()
    assert {name for name in before if before[name] != after[name]} == {page.with_suffix('.csv').name}      # only the incomplete comparison was made again
    healed, out, err = end(start('study.yaml', {**plan, 'generators': plan['generators'][:1]}))
    assert healed == 0 and 'INCOMPLETE' not in out, err
    assert {name for name in before if before[name] != finished().get(name)} <= {page.with_suffix('.csv').name}

def test_killed_in_the_middle(place):
    "First the kernel of a training is killed, then everything: the next study goes on from the checkpoint, and finds what it would have found undisturbed."
    plan = study(generator('diffusion', kimg=12, checkpoint_every=1), mixtures=['real', 'synthetic'], evaluation=None)
    run = run_of(plan)
    checkpoints = lambda: sorted((run.folder/'training').glob('checkpoint-*[0-9]'))

    process = start('study.yaml', plan)
    until(checkpoints)
    kernel = until(lambda: [c for c in psutil.Process(read_record(record_of(run))['pid']).children() if 'ipykernel' in ' '.join(c.cmdline())])[0]
    kernel.kill()
    code, out, err = end(process)
    said = read_record(record_of(run))
    assert code == 1 and said['state'] == 'killed' and 'the kernel died' in said['line'] and 'the kernel died' in out, err
    real = {name: stamp for name, stamp in finished().items() if name.startswith(('data', 'unet-real'))}
    assert len(real) == 2

    first = json.loads((checkpoints()[-1]/'state.json').read_text())['step']
    process = start('study.yaml', plan)
    until(lambda: read_record(record_of(run)).get('state') == 'running' and checkpoints() and json.loads((checkpoints()[-1]/'state.json').read_text())['step'] > first)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]: victim.send_signal(signal.SIGKILL)
    process.communicate()
    until(lambda: read_record(record_of(run))['state'] == 'lost')
    assert 'lost' in subprocess.run([SYNTHMR, 'status', 'study.yaml'], capture_output=True, text=True).stdout

    code, out, err = end(start('study.yaml', plan))
    assert code == 0 and 'INCOMPLETE' not in out, err
    assert {name: finished()[name] for name in real} == real
    steps = [json.loads(line)['step'] for line in (run.folder/'training'/'log.jsonl').read_text().splitlines()]
    assert steps == sorted(set(steps))
    weights = (run.folder/'training'/'weights.safetensors').read_bytes()
    undisturbed = subprocess.run([sys.executable, '-c', 'from synthmr.params import load; from synthmr.studies.runs import *; r = load(GeneratorRun, "generator.yaml"); make_data(r.data); train_generator(r); print(r.folder)'],
                                 env={**os.environ, 'SYNTHMR_HOME': str(place/'undisturbed'), 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert (Path(undisturbed)/'training'/'weights.safetensors').read_bytes() == weights

def test_two_at_once(place):
    "The same study a second time is refused; another study that shares a generator waits for it and does not train it again."
    plan = study(generator('diffusion', kimg=6), mixtures=['real', 'synthetic'], evaluation=None)
    run = run_of(plan)
    first = start('study.yaml', plan)
    until(lambda: read_record(record_of(run)).get('state') == 'running')
    code, _, err = end(start('study.yaml', plan))
    assert code == 1 and 'is being carried out already (process ' in err and 'synthmr status' in err
    other = start('other.yaml', {**plan, 'seeds': [1]})
    began = read_record(record_of(run))['began']
    assert end(first)[0] == 0
    code, out, err = end(other)
    assert code == 0, err
    assert read_record(record_of(run))['began'] == began
