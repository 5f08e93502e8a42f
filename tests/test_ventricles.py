"Guided ventricles: the parts against known answers, and the study from end to end at toy size."
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from synthmr.data.nifti import InputError
from synthmr.images import StoreError
from synthmr.training import load_weights
from synthmr.ventricles.anatomy import BrainsParams, simulate_brain, simulate_brains
from synthmr.ventricles.image_generator import ImageAutoencoder, ImageGenerator, ImageGeneratorParams, train_image_generator
from synthmr.ventricles.latent import AutoencoderParams, guided
from synthmr.ventricles.mask_generator import MaskAutoencoder, MaskGenerator, MaskGeneratorParams, train_mask_generator
from synthmr.ventricles.pairs import FREESURFER, PairsParams, find_pairs, prepare_pairs, read_pair
from synthmr.ventricles.volumes import CLASSES, VENTRICLES, VolumeStore, VolumeWriter, millilitres

torch.set_num_threads(1)
SHAPE = (24, 24, 24)
TRAINING = {'kimg': 0.02, 'batch_size': 4, 'ema_kimg': 0.05, 'log_every': 0.01, 'device': 'cpu'}
AUTOENCODER = {'channels': [4, 8], 'blocks': 1, 'latent_channels': 2, 'groups': 2, 'learning_rate': 3e-3, 'training': TRAINING}
DIFFUSION = {'channels': [8, 16], 'blocks': 1, 'groups': 4, 'heads_of': 8, 'attention': True, 'sampling_steps': 4, 'learning_rate': 2e-3, 'training': TRAINING}
MASKS = {'autoencoder': AUTOENCODER, 'diffusion': DIFFUSION}
IMAGES = {**MASKS, 'spade_channels': 4}
BRAINS = {'train': 6, 'normal': 2, 'test': 3, 'seed': 3, 'spacing': 8, 'shape': list(SHAPE), 'workers': 0}
STUDY = {'study': 'ventricles', 'data': {'dataset': 'tiny', 'simulated': BRAINS}, 'masks': MASKS, 'images': IMAGES, 'synthetic': {'volumes': 5, 'guidance': 2}, 'guidance': [0, 2], 'checked': 4,
         'segmentation': {'filters': [4, 8, 8], 'optimiser': 'adamw', 'learning_rate': 0.01, 'training': {**TRAINING, 'kimg': 0.04}}, 'seeds': [0]}

@pytest.fixture(scope='module')
def store(tmp_path_factory): return simulate_brains(tmp_path_factory.mktemp('brains')/'store', BrainsParams(**BRAINS), progress=False)

def ellipsoid(axes, spacing, shape=(40, 48, 40)):
    grid = np.meshgrid(*((np.arange(n) - (n - 1)/2) * spacing for n in shape), indexing='ij')
    return (sum((g / a)**2 for g, a in zip(grid, axes)) < 1).astype(np.uint8)

# ---- volumes, brains
@pytest.mark.parametrize('spacing', [1.5, 2, 3, 4])
def test_millilitres_of_ellipsoids(spacing):
    for axes in ((15, 30, 18), (20, 20, 20), (14, 26, 17)):
        true = 4/3 * np.pi * np.prod(axes) / 1000
        assert abs(millilitres(ellipsoid(axes, spacing), spacing) - true) < 0.015 * max(2, spacing) * true

def test_enlarged_brains_are_beyond_normal_ones_and_made_otherwise(store):
    by = store.slices.groupby('split').ml
    assert by.min()['test'] > by.max()['train'] and by.max()['train'] < 70
    same_number = [simulate_brain(0, process, BrainsParams(**BRAINS)) for process in ('normal', 'enlarged')]
    correlation = np.corrcoef(*(v[0][(same_number[0][1] > 0) & (same_number[1][1] > 0)] for v in same_number))[0, 1]
    assert (same_number[0][1] != same_number[1][1]).mean() > 0.05 and correlation < 0.95

def test_simulation_goes_on_after_a_kill_and_gives_the_same(store, tmp_path):
    params = BrainsParams(**BRAINS)
    with VolumeWriter(tmp_path/'again', {k: store.meta[k] for k in ('shape', 'spacing', 'simulated', 'what', 'brains')}) as writer:
        writer.append('SIMN_00000', store[[0]], [dict(store.slices.iloc[0])])
    assert simulate_brains(tmp_path/'again', params, progress=False).fingerprint == store.fingerprint
    with pytest.raises(StoreError, match='another store'): simulate_brains(tmp_path/'again', params.model_copy(update={'seed': 9}))

# ---- the door for patients
def write(folder, name, image, labels, affine=None):
    folder.mkdir(exist_ok=True)
    for ending, data in (('_T1w', image), ('_labels', labels)): nib.Nifti1Image(data, np.diag([-2., -2, 2, 1]) if affine is None else affine).to_filename(folder/f'{name}{ending}.nii.gz')

def test_freesurfer_numbers_of_a_folder_become_classes_and_millilitres(tmp_path):
    head, inner = (ellipsoid(a, 2, (60, 70, 60)).transpose(2, 1, 0) for a in ((45, 55, 45), (15, 30, 20)))
    labels = (head * 2).astype(np.int16)
    labels[:30][head[:30] > 0] = 41
    labels[inner > 0] = 4; labels[:30][inner[:30] > 0] = 43
    write(tmp_path/'pairs', 'A', (head * 100 + (1 - head) * 7).astype(np.int16), labels)
    write(tmp_path/'pairs', 'B', (head * 900.).astype(np.float32), labels)
    params = PairsParams(nifti=str(tmp_path/'pairs'), spacing=4, shape=(32, 32, 32), normal_share=0.)
    made = prepare_pairs(tmp_path/'store', params, progress=False)
    true = 4/3 * np.pi * 15 * 30 * 20 / 1000
    assert made.slices.subject.tolist() == ['A', 'B'] and np.allclose(made.slices.ml, true, rtol=0.07) and (made.slices.split == 'train').all()
    scan, classes = made[0]
    assert set(np.unique(classes)) == {0, VENTRICLES, CLASSES.index('white matter')} and (scan[classes == 0] == 0).all() and (scan[classes > 0] > 100).all()      # without what lies outside the head
    assert prepare_pairs(tmp_path/'large', params.model_copy(update={'enlarged_above': 20.}), progress=False).slices.split.tolist() == ['test', 'test']
    own = params.model_copy(update={'table': {0: 'background', 2: 'grey matter', 41: 'grey matter', 4: 'ventricles', 43: 'other CSF'}})
    assert abs(millilitres(read_pair(find_pairs(own)[0], own)[1], 4) - true / 2) < 0.12 * true

def test_orientation_of_the_file_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.zeros((30, 36, 32), np.int16); labels[6:26, 6:30, 6:28] = 2; labels[8:14, 10:22, 12:20] = 4
    image = (labels > 0) * rng.integers(50, 200, labels.shape).astype(np.int16)
    write(tmp_path/'a', 'A', image, labels)
    (tmp_path/'b').mkdir()
    for ending in ('_T1w', '_labels'):
        one = nib.load(tmp_path/'a'/f'A{ending}.nii.gz')
        one.as_reoriented(nib.orientations.axcodes2ornt('SPL', (('R', 'L'), ('A', 'P'), ('I', 'S')))).to_filename(tmp_path/'b'/f'A{ending}.nii.gz')
    assert nib.load(tmp_path/'b'/'A_T1w.nii.gz').shape != image.shape
    found = []
    for folder in ('a', 'b'):
        params = PairsParams(nifti=str(tmp_path/folder), spacing=2, shape=(32, 36, 32))
        found.append(read_pair(find_pairs(params)[0], params))
    assert (found[0][1] == found[1][1]).all() and np.abs(found[0][0].astype(int) - found[1][0]).max() <= 1
    left = np.argwhere(found[0][1] == VENTRICLES)[:, 2].mean() - np.argwhere(found[0][1] > 0)[:, 2].mean()
    centre = np.argwhere(labels == 4)[:, 0].mean() - np.argwhere(labels > 0)[:, 0].mean()
    assert np.sign(left) == np.sign(centre)         # x of this file runs to the left, as the store's

@pytest.mark.parametrize('what, words', [('label', 'labels 99, 98 are not|labels 98, 99 are not'), ('shape', 'its image has'), ('alone', 'has no label map'), ('twice', 'a second file of subject'), ('cut', 'truncated|stop in the middle|damaged'), ('empty', 'no images'), ('nowhere', 'no such folder')])
def test_what_cannot_be_used_is_named(tmp_path, what, words):
    folder = tmp_path/'pairs'
    labels, image = np.full((8, 8, 8), 4, np.int16), np.full((8, 8, 8), 9, np.int16)
    if what == 'label': labels[0, 0, :2] = 98, 99
    if what not in ('empty', 'nowhere'): write(folder, 'A', image if what != 'shape' else image[:4], labels)
    if what == 'empty': folder.mkdir()
    if what == 'shape': nib.Nifti1Image(image[:4], np.eye(4)).to_filename(folder/'A_T1w.nii.gz'); nib.Nifti1Image(labels, np.eye(4)).to_filename(folder/'A_labels.nii.gz')
    if what == 'alone': (folder/'A_labels.nii.gz').unlink()
    if what == 'twice': write(folder/'more', 'A', image, labels)
    if what == 'cut': path = folder/'A_T1w.nii.gz'; path.write_bytes(path.read_bytes()[:-9])
    params = PairsParams(nifti=str(folder), spacing=4, shape=(16, 16, 16))
    with pytest.raises(InputError, match=words) as refused: prepare_pairs(tmp_path/'store', params, progress=False)
    assert str(folder) in str(refused.value) and '\n' not in str(refused.value)

def test_every_freesurfer_class_is_known(): assert set(FREESURFER.values()) == set(CLASSES)

# ---- autoencoder, guidance, SPADE
def quick(**differs): return {**AUTOENCODER, 'training': {**TRAINING, **differs}}

def test_the_autoencoder_gives_back_a_mask():
    "It learns one mask by heart: the way through the latents is open."
    mask = torch.zeros(1, 16, 16, 16, dtype=torch.int64); mask[:, 2:14, 2:14, 2:14] = 4; mask[:, 5:11, 5:11, 5:11] = 3; mask[:, 6:10, 5:11, 7:10] = VENTRICLES
    batch = torch.stack([torch.zeros(mask.shape), mask / 127.5], 1) - 1
    torch.manual_seed(0)
    model = MaskAutoencoder(AutoencoderParams(**{**AUTOENCODER, 'channels': (8, 8), 'mirrored': False}))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    before = model.decode(model.encode(batch)).argmax(1)
    for step in range(120): optimizer.zero_grad(); model.loss(batch, step)[0].backward(); optimizer.step()
    model.eval()
    latents = model.encode(batch)
    after = model.decode(latents).argmax(1)
    def dice(a): return (2 * ((a == VENTRICLES) & (mask == VENTRICLES)).sum() / ((a == VENTRICLES).sum() + (mask == VENTRICLES).sum())).item()
    assert latents.shape == (1, 2, 8, 8, 8) and dice(after) > 0.9 > 0.5 > dice(before) and (after == mask).float().mean() > 0.97

def test_guidance_is_linear_and_asks_for_no_more_than_it_needs():
    a, b, asked = torch.randn(3), torch.randn(3), []
    def conditional(): asked.append('c'); return a
    def unconditional(): asked.append('u'); return b
    assert torch.equal(guided(conditional, unconditional, 0), b) and asked == ['u']
    asked.clear(); assert torch.equal(guided(conditional, unconditional, 1), a) and asked == ['c']
    for w in (0.5, 2, 3, 5): assert torch.allclose(guided(conditional, unconditional, w), b + w * (a - b))

@pytest.fixture(scope='module')
def mask_generator(store, tmp_path_factory):
    return train_mask_generator(MaskGeneratorParams(**MASKS), store.where(split='train'), tmp_path_factory.mktemp('masks'), seed=1, progress=False)

def test_masks_are_functions_of_seed_number_size_and_scale(mask_generator):
    model = mask_generator
    one = model.draw(0, 3, torch.tensor([30.]), 2)
    assert torch.equal(model.draw(0, 3, torch.tensor([30.]), 2), one) and torch.isfinite(one).all()
    for other in (model.draw(0, 4, torch.tensor([30.]), 2), model.draw(1, 3, torch.tensor([30.]), 2), model.draw(0, 3, torch.tensor([60.]), 2), model.draw(0, 3, torch.tensor([30.]), 3)): assert not torch.equal(other, one)
    assert torch.equal(model.draw(0, 3, torch.tensor([30.]), 0), model.draw(0, 3, torch.tensor([90.]), 0))      # unconditional
    mask = model.generate(0, 3, 30, 1)
    assert mask.dtype == np.uint8 and mask.shape == SHAPE and mask.max() < len(CLASSES)

def test_estimate_of_the_network_follows_the_formula(mask_generator):
    x, sigma, condition, model = torch.randn(1, *mask_generator.shape), torch.tensor([0.7]), torch.tensor([45.]), mask_generator
    with torch.no_grad():
        told, untold = (model.estimate(x, sigma, condition, torch.tensor([g]))[1] for g in (1., 0.))
        assert torch.equal(untold, model.estimate(x, sigma, condition * 3, torch.zeros(1))[1]) and not torch.equal(told, untold)
        assert torch.allclose(guided(lambda: told, lambda: untold, 3), untold + 3 * (told - untold))

def test_mask_generator_resumes_to_the_same_weights(mask_generator, store, tmp_path):
    "Trained again, with the diffusion model interrupted once."
    params, real = MaskGeneratorParams(**MASKS), store.where(split='train')
    original, left = MaskGenerator.loss, iter(range(2))
    def cut(self, batch, step):
        if next(left, None) is None: raise KeyboardInterrupt
        return original(self, batch, step)
    often = params.model_copy(update={'diffusion': params.diffusion.model_copy(update={'training': params.diffusion.training.model_copy(update={'checkpoint_every': 0.004})})})
    MaskGenerator.loss = cut
    try:
        with pytest.raises(KeyboardInterrupt): train_mask_generator(often, real, tmp_path, seed=1, progress=False)
    finally: MaskGenerator.loss = original
    assert list((tmp_path/'diffusion').glob('checkpoint-*'))
    again = train_mask_generator(often, real, tmp_path, seed=1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(again.denoiser.state_dict().values(), mask_generator.denoiser.state_dict().values()))

def test_spade_changes_the_image_where_the_mask_changed():
    "The decoder learns one brain by heart; a ball of white matter turned into ventricle is dark, and little else is."
    z, y, x = np.mgrid[:16, :24, :16]
    mask = np.where(((z - 8) / 7)**2 + ((y - 12) / 11)**2 + ((x - 8) / 7)**2 < 1, 4, 0); mask[6:9, 9:14, 6:10] = VENTRICLES
    grey = np.choose(mask, (0, 40, 60, 120, 200))
    batch = torch.from_numpy(np.stack([grey, mask])).float()[None] / 127.5 - 1
    torch.manual_seed(0)
    model = ImageAutoencoder(ImageGeneratorParams(**{**IMAGES, 'autoencoder': {**AUTOENCODER, 'mirrored': False}}))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(80): optimizer.zero_grad(); model.loss(batch, step)[0].backward(); optimizer.step()
    changed = mask.copy(); ball = (z - 8)**2 + (y - 18)**2 + (x - 8)**2 < 7; changed[ball & (mask > 0)] = VENTRICLES
    with torch.no_grad():
        latents = model.encode(batch)
        before, after = ((model.decode(latents, torch.from_numpy(m)[None])[0, 0].numpy() + 1) * 127.5 for m in (mask, changed))
    difference, far = np.abs(after - before), (mask > 0) & (y < 8)
    assert np.abs(before - grey)[mask > 0].mean() < 20
    assert (before - after)[changed != mask].mean() > 50 and difference[far].mean() < 0.1 * difference[changed != mask].mean() and (after[mask == 0] == 0).all()

def test_images_are_functions_of_seed_number_and_mask(store, tmp_path):
    model = train_image_generator(ImageGeneratorParams(**IMAGES), store.where(split='train'), tmp_path, seed=0, progress=False)
    mask, other = store[0][1], store[1][1]
    one = model.generate(0, 2, mask)
    assert (model.generate(0, 2, mask) == one).all() and (model.generate(0, 3, mask) != one).any() and (model.generate(0, 2, other) != one).any() and (one[mask == 0] == 0).all()
    again = ImageGenerator(ImageGeneratorParams(**IMAGES), ImageAutoencoder(ImageGeneratorParams(**IMAGES)), SHAPE)
    load_weights(again.autoencoder, tmp_path/'autoencoder'); load_weights(again, tmp_path/'diffusion')
    assert (again.eval().generate(0, 2, mask) == one).all()

def test_grids_that_networks_cannot_halve_are_refused():
    with pytest.raises(ValueError, match='multiple of 4'): MaskGenerator(MaskGeneratorParams(**MASKS), MaskAutoencoder(AutoencoderParams(**AUTOENCODER)), (24, 26, 24), 8.)

# ---- the study
def run(place, study, *arguments):
    (place/'study.yaml').write_text(yaml.safe_dump(study))
    environment = {**{k: v for k, v in os.environ.items() if k != 'SYNTHMR_HOME'}, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([Path(sys.executable).with_name('synthmr'), 'study', 'study.yaml', *arguments], cwd=place, env=environment, capture_output=True, text=True)

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    place = tmp_path_factory.mktemp('ventricles')
    (place/'params').mkdir(); (place/'settings.ini').touch()
    finished = run(place, STUDY)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return place, finished

@pytest.mark.xdist_group('ventricles')     # one study for all
def test_study_ends_with_published_and_own_errors(done):
    place, finished = done
    assert 'SIMULATED' in finished.stdout and '9.09 ± 12.18' in finished.stdout and 'real + synthetic' in finished.stdout
    page = Path(finished.stdout.strip().splitlines()[-1])
    assert page.suffix == '.html' and 'Bland-Altman' in page.read_text()

@pytest.mark.xdist_group('ventricles')     # one study for all
def test_study_leaves_reports_rows_and_pairs(done):
    place, _ = done
    reports = sorted((place/'results'/'tiny').glob('*.ipynb'))
    assert len(reports) == 1 + 2 + 1 + 4 + 1
    for report in reports:
        outputs = [o for c in json.loads(report.read_text())['cells'] for o in c.get('outputs', [])]
        assert any('image/png' in o.get('data', {}) for o in outputs) and not any(o['output_type'] == 'error' for o in outputs), report
        assert len(pd.read_csv(report.with_suffix('.csv'))) > 0
    rows = pd.read_csv(next((place/'results'/'tiny').glob('ventricles-*.csv')))
    assert set(rows.mixture) == {'real', 'synthetic', 'both', 'painted'} and set(rows.split) == {'normal', 'test'} and np.allclose(rows.absolute_ml, rows.error_ml.abs()) and len(rows) == 4 * 5
    pairs = VolumeStore.open(next((place/'artifacts'/'tiny').glob('synthetic-*'))/'samples')
    assert len(pairs) == 5 and np.allclose(pairs.slices.ml, [millilitres(v[1], 8) for v in pairs[:]]) and ((pairs[:][:, 0] > 0) <= (pairs[:][:, 1] > 0)).all() and not pairs.meta.get('subject')

@pytest.mark.xdist_group('ventricles')     # one study for all
def test_study_again_does_nothing_and_a_changed_set_leaves_the_generators(done):
    place, _ = done
    assert 'Nothing to be done' in run(place, STUDY).stderr
    dry = run(place, {**STUDY, 'synthetic': {'volumes': 6, 'guidance': 2}}, '--dry-run')
    said = dry.stdout + dry.stderr
    assert dry.returncode == 0 and 'ventricles_synthetic' in said and not any(f'{kind}:' in said for kind in ('ventricles_data', 'ventricles_masks', 'ventricles_images'))
