"Images from elsewhere: bit for bit from PNG and NIfTI, what is wrong with files is named, a killed import resumes, and a study takes the store."
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from tiny import DATA, study

from synthmr.cli import main
from synthmr.data.imported import ImagesParams, ImportParams, import_images, open_images
from synthmr.data.nifti import InputError
from synthmr.data.prepare import PrepareParams, prepare
from synthmr.data.simulated import SimulatedParams, simulate_cohort
from synthmr.params import ParamsError, check, load
from synthmr.slices import CHANNELS, SliceStore, StoreError
from synthmr.studies.cost import measurements, plan
from synthmr.studies.runs import GeneratorRun, train_generator
from synthmr.studies.study import Study
from synthmr.training import TrainingError

AIDA = dict(zip(CHANNELS, ('T1', 'T1CE', 'T2', 'FLAIR', 'SEG')))
BRATS = dict(zip(CHANNELS, ('_t1', '_t1ce', '_t2', '_flair', '_seg')))

@pytest.fixture(scope='module')
def original(tmp_path_factory) -> SliceStore:
    "Slices of two simulated subjects, 16x16."
    folder = tmp_path_factory.mktemp('original')
    simulate_cohort(folder/'cohort', SimulatedParams(subjects=2, spacing=5, workers=0), progress=False)
    return prepare(PrepareParams(nifti=str(folder/'cohort'), resolution=16, test_share=0.5, workers=0), folder/'store', progress=False)

def write(folder, images, name='sample_{}', channels=AIDA) -> Path:
    "Images as PNG, a folder for each channel."
    for k, place in enumerate(channels.values()):
        (folder/place).mkdir(parents=True)
        for i, image in enumerate(images): Image.fromarray(image[k]).save(folder/place/f'{name.format(i)}.png')
    return folder

def imported(folder, **kw) -> SliceStore: return import_images(ImportParams(folder=str(folder), **kw), folder.with_name(f'{folder.name}.store'), progress=False)

@pytest.mark.parametrize('channels', [AIDA, dict(zip(CHANNELS, ('t1', 't1ce', 't2', 'flair', 'seg'))), dict(zip(CHANNELS, ('T1n', 'T1-Gd', 'T2w', 't2_flair', 'Labels')))], ids=['AIDA', 'lower case', 'other words'])
@pytest.mark.parametrize('name', ['seed{:04d}', 'sample_{}', '{}'])
def test_png_folders_come_back_bit_for_bit(original, tmp_path, channels, name):
    store = imported(write(tmp_path/'png', original[:12], name, channels))
    assert np.array_equal(store[:], original[:12]) and store.slices.number.tolist() == list(range(12)) and store.meta['annotation']['moved'] == 0
    assert store.slices.seed.tolist() == (list(range(12)) if 'seed' in name else [0] * 12)
    assert store.slices.tumour.tolist() == original.slices.tumour[:12].tolist()

@pytest.mark.parametrize('axes', [2, 3])
@pytest.mark.parametrize('layout', ['flat', 'folders'])
def test_nifti_slices_come_back_bit_for_bit(original, tmp_path, axes, layout):
    "As in BraTS, names end with the channel; the annotation holds labels."
    some = original.with_tumour()[:6]
    for i, image in enumerate(some):
        place = tmp_path/'nifti'/(f'id{i}' if layout == 'folders' else '')
        place.mkdir(parents=True, exist_ok=True)
        for k, ending in enumerate(BRATS.values()):
            values = image[k].T if k < 4 else (image[k].T // 51).astype(np.uint8)
            nib.Nifti1Image(values[:, :, None] if axes == 3 else values, np.diag([-15, -15, 5, 1])).to_filename(place/f'id{i}{ending}.nii.gz')
    store = imported(tmp_path/'nifti')
    assert np.array_equal(store[:], some) and store.meta['spacing'] == [5, 15, 15] and store.meta['labels'] == 'brats'

def test_sixteen_bits_and_grey_colour(original, tmp_path):
    folder = write(tmp_path/'png', original[:4])
    for path in folder.glob('T1/*.png'): Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path)
    for path in folder.glob('FLAIR/*.png'): Image.open(path).convert('RGB').save(path)
    assert np.array_equal(imported(folder)[:], original[:4])

def test_sixteen_bits_that_hold_eight_are_not_guessed(original, tmp_path):
    folder = write(tmp_path/'png', original[:2])
    for channel in list(AIDA.values())[:4]:
        for path in (folder/channel).glob('*.png'): Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16)).save(path)
    with pytest.raises(InputError, match='--white 255'): imported(folder)
    assert np.array_equal(imported(folder, white=255)[:], original[:2])

@pytest.mark.parametrize('values, labels', [((0, 1, 2, 4), 'brats'), ((0, 1, 2, 3), 'classes')])
def test_labels_are_recognised(original, tmp_path, values, labels):
    folder = write(tmp_path/'png', original[:])
    table = np.zeros(256, np.uint8); table[[0, 51, 102, 204]] = values
    for path in folder.glob('SEG/*.png'): Image.fromarray(table[np.asarray(Image.open(path))]).save(path)
    store = imported(folder)
    assert np.array_equal(store[:], original[:]) and store.meta['labels'] == labels
    odd = next(p for p in sorted(folder.glob('SEG/*.png')) if np.asarray(Image.open(p)).any())
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(odd)
    shutil.rmtree(store.path)
    with pytest.raises(InputError, match=rf'{odd.name}: labels \[9\]'): imported(folder, labels=labels, strict=True)

def test_annotations_are_snapped_and_the_distance_reported(original, tmp_path):
    images, rng = original[:20].copy(), np.random.default_rng(0)
    shift = rng.integers(0, 9, images[:, 4].shape)
    images[:, 4] = np.minimum(images[:, 4].astype(int) + shift, 255)
    store = imported(write(tmp_path/'png', images))
    found = store.meta['annotation']
    assert np.array_equal(store[:], original[:20]) and found['largest'] == 8 and found['doubtful'] == 0
    assert found['moved'] == pytest.approx((shift > 0).mean()) and found['histogram'][:9] == np.bincount(shift.reshape(-1)).tolist() and sum(found['histogram']) == found['pixels'] == shift.size

def test_soft_edges_are_counted_and_too_many_end_the_import(original, tmp_path):
    images = original[:20].copy()
    images[:, 4] = images[:, 0]     # no annotations at all
    folder = write(tmp_path/'png', images)
    with pytest.raises(InputError, match='--limit'): imported(folder)
    shutil.rmtree(tmp_path/'png.store.partial')
    assert imported(folder, limit=1).meta['annotation']['doubtful'] > 0.02

WRONG = {
    'a missing channel': (lambda f: (f/'T2/sample_1.png').unlink(), 'no file for T2w'),
    'another size': (lambda f: Image.new('L', (8, 8)).save(f/'FLAIR/sample_1.png'), 'sample_1.png: 8x8 pixels, but T1w has 16x16'),
    'not square': (lambda f: [Image.new('L', (8, 16)).save(f/c/'sample_1.png') for c in AIDA.values()], 'sample_1.png: 8x16 pixels; slices are square'),
    'smaller than the others': (lambda f: [Image.new('L', (8, 8)).save(f/c/'sample_1.png') for c in AIDA.values()], '8 pixels along a side, the images before have 16'),
    'damaged': (lambda f: (f/'T1/sample_1.png').write_bytes((f/'T1/sample_1.png').read_bytes()[:-20]), 'sample_1.png: damaged PNG'),
    'colour': (lambda f: Image.new('RGB', (16, 16), (1, 2, 3)).save(f/'T1CE/sample_1.png'), 'sample_1.png: is coloured'),
    'twice': (lambda f: shutil.copy(f/'T1/sample_1.png', f/'T1/image_0001.png'), 'sample_1.png: a second file'),
}

@pytest.mark.parametrize('what', WRONG)
def test_what_is_wrong_is_named_and_stops_nothing_else(original, tmp_path, what):
    folder, (spoil, words) = write(tmp_path/'png', original[:3]), WRONG[what]
    spoil(folder)
    store = imported(folder)
    assert np.array_equal(store[:], original[[0, 2]]) and store.slices.number.tolist() == [0, 2]
    [left] = store.meta['skipped']
    assert left['image'] == '1' and words in left['reason'] and '\n' not in left['reason']
    shutil.rmtree(store.path)
    with pytest.raises(InputError, match='1: '): imported(folder, strict=True)

def test_command(original, tmp_path, capsys):
    folder = write(tmp_path/'png', original[:])
    assert main(['import-images', str(folder), str(tmp_path/'store')]) == 0
    said = capsys.readouterr().out
    assert f'{len(original)} slices of 16x16' in said and '0.00% of the pixels moved' in said
    assert main(['import-images', str(folder), str(tmp_path/'store'), '--limit', '0.5']) == 1 and 'exists already' in capsys.readouterr().err
    assert main(['import-images', str(tmp_path/'nowhere'), str(tmp_path/'other')]) == 1 and len(capsys.readouterr().err.splitlines()) == 1
    assert main(['import-images', str(folder), str(tmp_path/'other'), '--limit', '7']) == 2 and 'limit' in capsys.readouterr().err

def test_killed_and_resumed(original, tmp_path):
    "A real kill: the store that comes out is the one that an undisturbed import makes."
    folder = write(tmp_path/'png', np.concatenate([original[:]] * 12)[:320])
    whole, command = imported(folder), [Path(sys.executable).with_name('synthmr'), 'import-images', folder, tmp_path/'killed']
    process, journal = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), tmp_path/'killed.partial/journal.jsonl'
    while not (journal.is_file() and journal.stat().st_size): assert process.poll() is None; time.sleep(0.001)
    process.send_signal(signal.SIGKILL); process.wait()
    assert not (tmp_path/'killed').exists()
    subprocess.run(command, check=True, capture_output=True)
    assert SliceStore.open(tmp_path/'killed').fingerprint == whole.fingerprint and SliceStore.open(tmp_path/'killed').meta['annotation'] == whole.meta['annotation']

def test_a_store_that_was_changed_is_not_the_one_that_was_meant(original, tmp_path):
    store = imported(write(tmp_path/'png', original[:4]))
    meant = check(ImagesParams, {'name': 'hub', 'store': str(store.path)})
    shutil.rmtree(store.path); imported(write(tmp_path/'other', original[4:8]))
    (tmp_path/'other.store').rename(store.path)
    with pytest.raises(StoreError, match='other images'): open_images(meant, 16)

def test_a_study_takes_the_store(tmp_path, monkeypatch):
    "Images of simulated patients, published as PNG, in the place of a generator: trained on, judged, compared, planned."
    (tmp_path/'params').mkdir(); (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path); monkeypatch.delenv('SYNTHMR_HOME', raising=False)
    simulate_cohort(tmp_path/'cohort', SimulatedParams(subjects=3, seed=8, spacing=4, workers=0), progress=False)
    other = prepare(PrepareParams(nifti='cohort', resolution=16, workers=0), tmp_path/'others', progress=False)
    write(tmp_path/'hub', other[:60])
    import_images(ImportParams(folder='hub', simulated=True), tmp_path/'hub_images', progress=False)
    images = {'data': DATA, 'generator': {'kind': 'images', 'name': 'hub', 'store': 'hub_images'}}
    (tmp_path/'study.yaml').write_text(yaml.safe_dump(study(images, mixtures=['real', 'synthetic'])))
    loaded = load(Study, 'study.yaml')
    assert loaded.generators[0].painted == 60 and not any('hub' in name for name in measurements(loaded))
    with pytest.raises(TrainingError, match='nothing to train'): train_generator(loaded.generators[0])
    with pytest.raises(ParamsError, match='hub stands twice'): check(Study, study(images, {**images, 'seed': 1}))
    done = subprocess.run([Path(sys.executable).with_name('synthmr'), 'study', 'study.yaml', '--cores', '2'], env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'hub only' in done.stdout
    rows = pd.concat(map(pd.read_csv, (tmp_path/'results/tiny').glob('unet-hub-synthetic-*.csv')))
    assert set(rows.generator) == {'hub'} and rows.dice.between(0, 1).all()
    judged = pd.read_csv(next((tmp_path/'results/tiny').glob('evaluation-hub-*.csv')))
    assert {'frechet_distance', 'too_close', 'label_consistency'} <= set(judged.metric)
    assert 'hub' in str(plan(loaded, rates={}, progress=False)) and load(GeneratorRun, next((tmp_path/'results/tiny').glob('hub-*.yaml'))).name == loaded.generators[0].name
