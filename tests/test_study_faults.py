"What goes wrong in a study on one machine: a failing cell, a kernel that dies, everything killed, two studies at once. What was finished stays, what was begun goes on."
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest

from study_at_work import SYNTHMR, Watched, end, finished, start, until
from tiny import generator, study

from synthmr.studies.jobs import read_record
from synthmr.studies.reproduce import differences, reproduced

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "A folder of a user's own, in which studies run."
    (tmp_path/'params').mkdir(); (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path); monkeypatch.delenv('SYNTHMR_HOME', raising=False)
    return tmp_path

def test_a_cell_that_fails_stops_no_other():
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

def kill(process: subprocess.Popen):
    "The study, Snakemake, its jobs and their kernels, without warning."
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        try: victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    process.communicate()

def test_killed_in_the_middle():
    "First the kernel of a training is killed, then the study is asked to end, then everything is killed: the next study goes on from the checkpoint, and finds what it would have found undisturbed."
    plan = study(generator('diffusion', kimg=5, checkpoint_every=0.5), mixtures=['real', 'synthetic'], evaluation=None)
    watched = Watched(plan['generators'][0])

    process = start('study.yaml', plan)
    first = watched.until_running()
    watched.kernel().kill()
    code, out, err = end(process)
    said = watched.record
    assert code == 1 and said['state'] == 'killed' and 'the kernel died' in said['line'] and 'the kernel died' in out, err
    real = {name: stamp for name, stamp in finished().items() if name.startswith(('data', 'unet-real'))}
    assert len(real) == 2

    process = start('study.yaml', plan)
    second = watched.until_running(first)
    kernel = watched.kernel()
    process.terminate()
    code, out, err = end(process)
    assert code == 130 and 'interrupted' in err and watched.record['state'] == 'killed' and 'SIGTERM' in watched.record['line'], err
    until(lambda: not kernel.is_running())

    process = start('study.yaml', plan)
    watched.until_running(second)
    kill(process)
    until(lambda: watched.record['state'] == 'lost')
    assert 'lost' in subprocess.run([SYNTHMR, 'status', 'study.yaml'], capture_output=True, text=True).stdout

    code, out, err = end(start('study.yaml', plan))
    assert code == 0 and 'INCOMPLETE' not in out, err
    assert {name: finished()[name] for name in real} == real
    assert watched.steps_logged() == sorted(set(watched.steps_logged())) and watched.weights() == watched.undisturbed_weights()

def test_killed_at_any_moment(place, monkeypatch):
    "Five times, at moments that nobody chose: the rows are those of a study that nothing happened to."
    plan = study(generator('diffusion', kimg=2, checkpoint_every=0.2), mixtures=['real', 'synthetic'], evaluation=None)
    seed = int(os.environ.get('SYNTHMR_TEST_SEED', time.time()))
    print(f'moments drawn with SYNTHMR_TEST_SEED={seed}')
    moments, alive = random.Random(seed), 0
    def at_work() -> list: return [p for p in Path('artifacts/tiny/jobs').glob('*.json') if read_record(p).get('state') == 'running']
    for _ in range(5):
        process = start('study.yaml', plan)
        until(lambda: at_work() or process.poll() is not None)
        time.sleep(moments.uniform(0, 10))
        alive += bool(at_work())
        kill(process)
    assert alive, 'never while a job was at work'
    code, out, err = end(start('study.yaml', plan))
    assert code == 0, err
    killed = {p.name: pd.read_csv(p) for p in Path('results/tiny').glob('*.csv')}

    (place/'undisturbed'/'params').mkdir(parents=True); (place/'undisturbed'/'settings.ini').touch()
    monkeypatch.chdir(place/'undisturbed')
    code, out, err = end(start('study.yaml', plan))
    assert code == 0, err
    for path in Path('results/tiny').glob('*.csv'): assert reproduced(found := differences(pd.read_csv(path), killed.pop(path.name))), found.to_string()
    assert not killed

def test_two_at_once():
    "The same study a second time is refused; another study that shares a generator waits for it and does not train it again."
    plan = study(generator('diffusion', kimg=5, checkpoint_every=0.5), mixtures=['real', 'synthetic'], evaluation=None)
    watched = Watched(plan['generators'][0])
    first = start('study.yaml', plan)
    until(lambda: watched.record.get('state') == 'running')
    watched.until_running()
    kernel = watched.kernel()
    kernel.suspend()    # so that it outlasts what follows
    time.sleep(1)
    half = nbformat.read(watched.run.result('.ipynb'), as_version=4)    # can be read while it runs
    assert [c.metadata.papermill.status for c in half.cells].count('completed') > 1 and 'pending' in {c.metadata.papermill.status for c in half.cells}
    said = subprocess.run([SYNTHMR, 'status', 'study.yaml'], capture_output=True, text=True).stdout
    assert f'running  {watched.run.name}: training' in said and ' %, ' in said and ' left (' in said, said
    code, _, err = end(start('study.yaml', plan))
    assert code == 1 and 'is being carried out already (process ' in err and 'synthmr status' in err
    other = start('other.yaml', {**plan, 'seeds': [1]})
    began = watched.record['began']
    until(lambda: list(Path('artifacts/tiny').glob('comparison-*.plan.json'))[1:])
    time.sleep(5)
    kernel.resume()
    assert end(first)[0] == 0
    code, out, err = end(other)
    assert code == 0, err
    assert watched.record['began'] == began
