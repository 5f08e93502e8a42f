"The ratio sweep and the ensemble: what their training sets hold, and both studies end to end."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from synthmr.cli import load_study
from synthmr.params import ParamsError
from synthmr.studies.pools import PooledRun
from synthmr.studies.runs import make_data, make_generator

ROOT = Path(__file__).resolve().parents[1]
DATA = {'dataset': 'tiny', 'simulated': {'subjects': 6, 'seed': 3, 'spacing': 4}, 'resolution': 16, 'test_share': 0.34}
GENERATOR = {'data': DATA, 'images': 40, 'generator': {'kind': 'stylegan2', 'latents': 8, 'width': 8, 'mapping_layers': 1, 'channel_base': 64, 'channel_max': 8, 'path_weight': 0, 'training': {'kimg': 0.1, 'batch_size': 8}}}
SEGMENTER = {'data': DATA, 'segmenter': {'kind': 'unet', 'levels': 3, 'filters': 8, 'optimiser': 'adamw', 'learning_rate': 0.01, 'validate_every': 0.2, 'training': {'kimg': 0.4, 'batch_size': 8}}}
RATIO = {'study': 'ratio', 'data': DATA, 'generator': GENERATOR, 'segmenter': SEGMENTER, 'total': 40, 'shares': [0, 0.5, 1], 'seeds': [0]}
ENSEMBLE = {'study': 'ensemble', 'data': DATA, 'generator': GENERATOR, 'segmenter': SEGMENTER, 'total': 40, 'members': [1, 2], 'seeds': [0]}

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder in which studies run."
    folder = tmp_path_factory.mktemp('pools')
    (folder/'params').mkdir(); (folder/'settings.ini').touch()
    return folder

@pytest.fixture
def made(place, monkeypatch):
    "Real and synthetic slices of two generators."
    monkeypatch.chdir(place); monkeypatch.delenv('SYNTHMR_HOME', raising=False)
    run = PooledRun.model_validate({**SEGMENTER, 'generator': GENERATOR, 'total': 40, 'members': 2})
    real = make_data(run.data).where(split='train')
    return real, [make_generator(g)[1] for g in run.generators]

def pooled(**differs): return PooledRun.model_validate({**SEGMENTER, 'generator': GENERATOR, 'total': 40, **differs})

def rows(store): return {image.tobytes() for image in store[:]}

def test_members_differ_in_their_seed_alone(made):
    real, (first, second) = made
    assert not np.array_equal(first[:], second[:])
    mixture, none, synthetic = pooled(members=2).training_set(real)
    assert mixture == 'synthetic' and none is None and len(synthetic) == 40
    assert np.array_equal(synthetic[:], np.concatenate([first[:20], second[:20]]))

def test_a_smaller_share_of_real_images_is_a_part_of_a_larger_one(made):
    real, (first, _) = made
    sets = {share: pooled(share=share).training_set(real) for share in (0.25, 0.5, 1)}
    assert [(m, len(r), s and len(s)) for m, r, s in sets.values()] == [('both', 10, 30), ('both', 20, 20), ('real', 40, None)]
    assert rows(sets[0.25][1]) < rows(sets[0.5][1]) < rows(sets[1][1]) <= rows(real)
    assert rows(sets[0.5][2]) == rows(first.select(np.arange(40) < 20))
    assert rows(pooled(share=0.25, seed=1).training_set(real)[1]) != rows(sets[0.25][1])

def test_synthetic_images_fill_what_real_ones_cannot(made):
    real, _ = made
    few = real.select(np.arange(len(real)) < 12)
    mixture, found, synthetic = pooled(share=1.).training_set(few)
    assert mixture == 'both' and len(found) == 12 and len(synthetic) == 28

def test_too_few_synthetic_images_are_refused():
    with pytest.raises(ValueError, match='41 synthetic images are needed of each generator, but generator.images is 40'): pooled(total=41)

@pytest.mark.parametrize('study', [RATIO, ENSEMBLE], ids=lambda s: s['study'])
def test_from_parameters_to_the_page(place, study):
    (place/'study.yaml').write_text(yaml.safe_dump(study))
    environment = {k: v for k, v in os.environ.items() if k != 'SYNTHMR_HOME'}
    done = subprocess.run([Path(sys.executable).with_name('synthmr'), 'study', 'study.yaml'], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'SIMULATED' in done.stdout and 'data-mime-type="image/svg+xml"' in Path(done.stdout.strip().splitlines()[-1]).read_text()
    table = pd.read_csv(next((place/'results'/'tiny').glob(f"{study['study']}-*.csv")))
    if study is RATIO: assert table.share.tolist() == [0, 0.5, 1] and table.total.eq(40).all()
    else: assert list(zip(table.members, table['first'])) == [(1, 0), (1, 1), (2, 0)]
    assert table.dice_mean.between(0, 1).all()

@pytest.mark.parametrize('name', sorted(str(p.relative_to(ROOT)) for p in (ROOT/'params').glob('*/*.yaml') if p.stem in ('study', 'ratio', 'ensemble')))
def test_the_studies_that_come_with_it_can_be_read(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(Path(name))
    assert len({run.name for run in study.cells}) == len(study.cells) > 0

def test_an_unknown_kind_of_study_is_named(tmp_path):
    (tmp_path/'s.yaml').write_text('study: ratios\n')
    with pytest.raises(ParamsError, match=r"s.yaml: study: unknown, 'ratios'; one of comparison, ratio, ensemble"): load_study(tmp_path/'s.yaml')
