"""What comes with images, or instead of ours: images from elsewhere, audits, weights to be released, volumes with label maps, keys and answers of readers. Each is damaged; one line names it, or it serves.

The same damage as in `test_hostile.py`, which has the files that everything begins with.
"""
import gzip
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import safetensors.torch
from damage import absurd, answers, damage, little_memory, many  # noqa: F401 little_memory is a fixture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_release import NETWORK, PARAMS, audit

from synthmr.data.imported import ImportParams, import_images
from synthmr.data.prepare import PrepareParams, prepare
from synthmr.data.simulated import SimulatedParams, simulate_cohort
from synthmr.generators.families import build_generator
from synthmr.generators.sampling import sample_store
from synthmr.privacy.release import release
from synthmr.slices import SliceStore
from synthmr.studies.reader_report import score, scores_text
from synthmr.studies.reader_scores import read_answers, read_key, simulated_reader
from synthmr.studies.reader_study import ReaderStudyParams, make_reader_study
from synthmr.ventricles.anatomy import BrainsParams, simulate_brains
from synthmr.ventricles.pairs import PairsParams, find_pairs, read_pair
from synthmr.ventricles.volumes import VolumeStore

FOLDERS = ('T1', 'T1CE', 'T2', 'FLAIR', 'SEG')

@pytest.fixture(scope='module')
def good(tmp_path_factory) -> Path:
    "Patients' and synthetic slices, an audit, a generator, images as files, a study of readers, volumes: whole, of each kind one."
    folder = tmp_path_factory.mktemp('good')
    simulate_cohort(folder/'cohort', SimulatedParams(subjects=2, seed=1, spacing=5, workers=0), progress=False)
    real = prepare(PrepareParams(nifti=str(folder/'cohort'), resolution=16, test_share=0.5, workers=0), folder/'real', progress=False)
    made = build_generator(NETWORK, 16, 0)
    (folder/'generator').mkdir()
    safetensors.torch.save_file(made.averaged.state_dict(), folder/'generator'/'weights.safetensors')
    (folder/'generator'/'config.json').write_text(json.dumps({'generator': NETWORK.model_dump(mode='json'), 'resolution': 16}))
    synthetic = sample_store(made, folder/'synthetic', 6, 3, {'spacing': real.meta['spacing'], 'simulated': True, 'generator': NETWORK.model_dump(mode='json')}, progress=False)
    audit(folder, synthetic, real)
    for k, channel in enumerate(FOLDERS):
        (folder/'png'/channel).mkdir(parents=True)
        for i in range(3): Image.fromarray(real[i][k]).save(folder/'png'/channel/f'sample_{i}.png')
    shutil.copytree(next(p for p in sorted((folder/'cohort').iterdir()) if p.is_dir()), folder/'nifti')
    make_reader_study(ReaderStudyParams(real=str(real.path), synthetic={'stylegan2': str(synthetic.path)}, images=3, graded=True, seed=1), folder/'page.html', folder/'key.json', progress=False)
    simulated_reader(read_key(folder/'key.json'), 'A', 1.).to_csv(folder/'answers.csv', index=False)
    simulate_brains(folder/'volumes', BrainsParams(train=2, normal=1, test=1, seed=1, spacing=8, shape=(16, 24, 16), workers=0), progress=False)
    return folder

@many(120)
@given(st.integers(0, 1 << 20), st.sampled_from(['png', 'nifti']), st.booleans(), damage())
def test_damaged_images_from_elsewhere(good, tmp_path_factory, which, kind, strict, change):
    folder = tmp_path_factory.mktemp('elsewhere')
    shutil.copytree(good/kind, folder/'files')
    files = sorted(f for f in (folder/'files').rglob('*') if f.name.endswith(('.png', '.nii.gz')))
    file = files[which % len(files)]
    file.write_bytes(gzip.compress(change(gzip.decompress(file.read_bytes())), 1) if kind == 'nifti' else change(file.read_bytes()))
    answers(lambda: import_images(ImportParams(folder=str(folder/'files'), strict=strict, resolution=16), folder/'store', progress=False)[:], folder)

@many(120)
@given(st.sampled_from([damage(), absurd()]).flatmap(lambda how: how))
def test_damaged_audits(good, tmp_path_factory, change):
    "A release is written, or one line says what is wrong and nothing is."
    folder = tmp_path_factory.mktemp('audits')
    (folder/'audit.json').write_bytes(change((good/'audit.json').read_bytes()))
    answers(lambda: release(SliceStore.open(good/'synthetic'), folder/'out', PARAMS, folder/'audit.json', training=SliceStore.open(good/'real'), progress=False), folder, good)
    assert not list(folder.glob('out.*'))

@many(80)
@given(st.booleans(), damage(), absurd())
def test_damaged_weights_in_a_release(good, tmp_path_factory, weights, change, other):
    folder = tmp_path_factory.mktemp('weights')
    shutil.copytree(good/'generator', folder/'generator')
    file = folder/'generator'/('weights.safetensors' if weights else 'config.json')
    file.write_bytes((change if weights else other)(file.read_bytes()))
    answers(lambda: release(SliceStore.open(good/'synthetic'), folder/'out', PARAMS, good/'audit.json', folder/'generator', progress=False), folder)

@many(150)
@given(st.sampled_from(['key.json', 'answers.csv']), damage(), st.one_of(st.none(), absurd()))
def test_damaged_keys_and_answers_of_readers(good, tmp_path_factory, name, change, other):
    folder = tmp_path_factory.mktemp('readers')
    for file in ('key.json', 'answers.csv'): shutil.copy(good/file, folder/file)
    (folder/name).write_bytes((other if other and name == 'key.json' else change)((folder/name).read_bytes()))
    def use():
        key = read_key(folder/'key.json')
        scores_text(score(key, read_answers(key, [folder/'answers.csv'])))
    answers(use, folder)

@many(100)
@given(st.sampled_from(['meta.json', 'volumes.csv', 'images.npy']), damage(), st.one_of(st.none(), absurd()))
def test_damaged_volume_stores(good, tmp_path_factory, name, change, other):
    path = tmp_path_factory.mktemp('volumes')/'store'
    shutil.copytree(good/'volumes', path)
    (path/name).write_bytes((other if other and name == 'meta.json' else change)((path/name).read_bytes()))
    def use():
        store = VolumeStore.open(path)
        _ = store[:], store.where(split='train'), store.fingerprint, store.spacing, repr(store)
    answers(use, path)

@many(50)
@given(st.booleans(), damage())
def test_damaged_volumes_with_label_maps(good, tmp_path_factory, labels, change):
    folder = tmp_path_factory.mktemp('pairs')
    image, classes = VolumeStore.open(good/'volumes')[0]
    for kind, volume in (('T1w', image), ('labels', np.array([0, 4, 24, 3, 2], np.uint8)[classes])): nib.Nifti1Image(volume, np.diag([8., 8, 8, 1])).to_filename(folder/f'a_{kind}.nii')
    file = folder/('a_labels.nii' if labels else 'a_T1w.nii')
    file.write_bytes(change(file.read_bytes()))
    params = PairsParams(nifti=str(folder), spacing=8, shape=(24, 24, 24))
    answers(lambda: read_pair(find_pairs(params)[0], params), folder)
