"A row of a result is made again, by the code of its commit, from nothing."
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tiny import generator, study

ROOT = Path(__file__).resolve().parents[1]
PLAN = study(generator('diffusion'), mixtures=['real'], evaluation=None)
MAIN = 'import sys; from synthmr.cli import main; sys.exit(main())'

@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "A clone of this repository in which a tiny study was carried out; its code is that of the last commit."
    folder = tmp_path_factory.mktemp('reproduce')/'clone'
    subprocess.run(['git', 'clone', '--quiet', '--local', ROOT, folder], check=True)
    (folder/'study.yaml').write_text(yaml.safe_dump(PLAN))
    done = synthmr(folder, 'study', 'study.yaml', '--cores', '2')
    assert done.returncode == 0, done.stderr
    return folder

def synthmr(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != 'SYNTHMR_HOME'} | {'PYTHONPATH': str(clone), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-c', MAIN, *arguments], cwd=clone, env=environment, capture_output=True, text=True)

def test_a_row_again(clone, tmp_path):
    "Row 1 comes out the same; row 0, which somebody changed, does not: another row is not looked at."
    table = next((clone/'results'/'tiny').glob('unet-real-*.csv'))
    rows = pd.read_csv(table)
    assert rows.dirty.eq(False).all() and rows.commit.nunique() == 1
    rows.loc[0, 'dice'] += 0.01
    rows.to_csv(table, index=False)
    same = synthmr(clone, 'reproduce', f'{table}:1', '--out', str(tmp_path/'again'))
    assert same.returncode == 0 and 'reproduced: every value is the same' in same.stdout, same.stdout + same.stderr
    assert (tmp_path/'again'/'code'/'synthmr').is_dir() and not (tmp_path/'again'/'code'/'.git').is_dir()      # a worktree of the commit

    from synthmr.studies.reproduce import differences, reproduced
    again = pd.read_csv(next((tmp_path/'again'/'code'/'results'/'tiny').glob(table.name)))
    found = differences(rows, again)
    assert not reproduced(found) and found.set_index('column').largest['dice'] == pytest.approx(0.01)

def test_what_cannot_be_made_again(clone, tmp_path):
    "One line that says why."
    table = next((clone/'results'/'tiny').glob('unet-real-*.csv'))
    lost = tmp_path/table.name
    pd.read_csv(table).assign(commit='0' * 40).to_csv(lost, index=False)
    lost.with_suffix('.yaml').write_text(table.with_suffix('.yaml').read_text())
    done = synthmr(clone, 'reproduce', str(lost), '--out', str(tmp_path/'again'))
    assert done.returncode == 2 and f"commit {'0' * 40}" in done.stderr and done.stderr.count('\n') == 1
