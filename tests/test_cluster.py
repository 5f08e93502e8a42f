"The study as jobs of a real Slurm cluster of one node (tests/slurm.sh): the same rows as on one machine, and nothing lost when jobs are cancelled, requeued or run out of time."
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from study_at_work import Watched, end, finished, start, until
from tiny import NETWORKS, generator, study

from synthmr.studies.reproduce import differences, reproduced

def slurm_is_there() -> bool:
    "The cluster of tests/slurm.sh, no other."
    try: return 'synthmr-test' in subprocess.run(['scontrol', 'show', 'config'], capture_output=True, text=True).stdout
    except FileNotFoundError: return False

pytestmark = pytest.mark.skipif(not slurm_is_there(), reason='no Slurm here; as root, tests/slurm.sh start makes a cluster of one node')
CLUSTER = ('--profile', 'slurm-no-accounting', '--', '--slurm-init-seconds-before-status-checks', '3', '--seconds-between-status-checks', '3', '--latency-wait', '20')

@pytest.fixture
def place(tmp_path, monkeypatch):
    "Two folders of a user's own."
    for name in ('cluster', 'here'): (tmp_path/name/'params').mkdir(parents=True); (tmp_path/name/'settings.ini').touch()
    monkeypatch.delenv('SYNTHMR_HOME', raising=False); monkeypatch.setenv('OMP_NUM_THREADS', '1')
    return tmp_path

def test_the_same_rows_as_here(place, monkeypatch):
    "All five generators."
    plan, tables = study(*map(generator, NETWORKS), mixtures=['real', 'synthetic'], evaluation=None), {}
    for where, arguments in (('cluster', CLUSTER), ('here', ('--cores', '2'))):
        monkeypatch.chdir(place/where)
        code, out, err = end(start('study.yaml', plan, *arguments))
        assert code == 0, err
        tables[where] = {p.name: pd.read_csv(p) for p in Path('results/tiny').glob('*.csv')}
        if where == 'cluster': assert err.count('has been submitted with SLURM jobid') == len(tables[where])
    assert set(tables['cluster']) == set(tables['here']) and len(tables['here']) == 1 + 5 + 6 + 1
    for name in tables['here']: assert reproduced(found := differences(tables['here'][name], tables['cluster'][name])), found[found.same < found.of].to_string()

def suspend(beyond: dict[Watched, int]) -> dict[Watched, int]:
    "Hold each training as soon as it has a checkpoint newer than that; their steps."
    held = {}
    def all_held() -> bool:
        for watched in beyond.keys() - held:
            if watched.record.get('state') == 'running' and watched.step() > beyond[watched]: watched.kernel().suspend(); held[watched] = watched.step()
        return len(held) == len(beyond)
    until(all_held)
    return held

def scontrol(*arguments: str): subprocess.run(['scontrol', *arguments], check=True)

def test_cancelled_requeued_out_of_time(place, monkeypatch):
    "One training is cancelled, then sent back to the queue as by a node that failed; another one hangs until its time is over. Both end as if nothing had been."
    monkeypatch.chdir(place/'cluster')
    plan = study(generator('stylegan2', kimg=4, checkpoint_every=0.4), generator('diffusion', kimg=4, checkpoint_every=0.4), mixtures=['real', 'synthetic'], evaluation=None)
    style, diffusion = map(Watched, plan['generators'])
    process = start('study.yaml', plan, *CLUSTER)

    at = suspend({style: 0, diffusion: 0})
    scontrol('update', f"JobId={diffusion.record['slurm']}", 'TimeLimit=1')
    first = style.record['slurm']
    subprocess.run(['scancel', first], check=True)
    until(lambda: style.record.get('attempt') == 2)
    suspend({style: at[style]})
    second = style.record
    assert second['slurm'] != first
    scontrol('requeue', second['slurm'])

    code, out, err = end(process)
    assert code == 0 and 'INCOMPLETE' not in out, err
    assert style.record['slurm'] == second['slurm'] and style.record['began'] > second['began'] and diffusion.record['attempt'] == 2
    for watched in (style, diffusion):
        assert watched.steps_logged() == sorted(set(watched.steps_logged()))
        assert watched.weights() == watched.undisturbed_weights()
    assert len(finished()) == 1 + 2 + 3 + 1
