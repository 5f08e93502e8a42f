"Segmenters: what they learn, what they are shown, and that an interruption changes nothing."
import json

import numpy as np
import pytest
import torch

from synthmr.segmenters import training
from synthmr.segmenters.augmentation import Augmentation, AugmentationParams, code_augmentation
from synthmr.segmenters.training import (Segmentation, UNetParams, dice_of_counts, confusion, evaluate_segmenter, load_segmenter, segment,
                                         split_validation, train_segmenter, training_sources, validation_score)
from synthmr.slices import StoreWriter, annotation_to_classes, classes_to_annotation
from synthmr.training import TrainingError

SIZE = 32

def drawn(rng, z, place, radius):
    "A slice of an ellipsoid with a ball of three shells in it: uint8 (5, SIZE, SIZE). No brain."
    y, x = np.mgrid[-1:1:SIZE*1j, -1:1:SIZE*1j]
    brain = x**2/0.6 + y**2/0.8 + z**2 < 1
    d = np.sqrt((x - place[0])**2 + (y - place[1])**2 + (z - place[2])**2) / radius
    classes = np.select([d < 0.5, d < 0.8, d < 1.3], [1, 3, 2], 0) * brain
    grey = np.array([[110, 90, 110, 110], [110, 70, 110, 200], [100, 160, 160, 160], [100, 100, 170, 130]])[:, classes]
    return np.concatenate([np.clip((grey + rng.normal(0, 6, grey.shape))*brain, 0, 255), classes_to_annotation(classes)[None]]).astype(np.uint8)

@pytest.fixture(scope='session')
def store(tmp_path_factory):
    "Ten drawn subjects of twelve slices, two of them for the test."
    with StoreWriter(tmp_path_factory.mktemp('drawn')/'real', {'resolution': SIZE, 'spacing': [4, 6, 6], 'simulated': True}) as writer:
        for s in range(10):
            rng = np.random.default_rng(s)
            place, radius = rng.uniform(-0.35, 0.35, 3), rng.uniform(0.3, 0.45)
            images = np.stack([drawn(rng, z, place, radius) for z in np.linspace(-0.7, 0.7, 12)])
            writer.append(f's{s}', images, [dict(subject=f's{s}', z=z, split='train' if s < 8 else 'test', tumour=int((i[4] > 0).sum())) for z, i in enumerate(images)])
        return writer.finish()

@pytest.fixture(scope='session')
def real(store): return store.where(split='train')

@pytest.fixture(scope='session')
def synthetic(tmp_path_factory):
    "Fifty slices without subjects, brighter than any real one at one pixel."
    rng = np.random.default_rng(100)
    with StoreWriter(tmp_path_factory.mktemp('drawn')/'synthetic', {'resolution': SIZE, 'spacing': [4, 6, 6], 'simulated': True}) as writer:
        images = np.stack([drawn(rng, rng.uniform(-0.7, 0.7), rng.uniform(-0.35, 0.35, 3), 0.4) for _ in range(50)])
        images[:, 0, 0, 0] = 255
        writer.append('all', images, [dict(seed=0, number=i, split='train', tumour=int((x[4] > 0).sum())) for i, x in enumerate(images)])
        return writer.finish()

def params(**training):
    "A small U-Net and a short training."
    t = {'kimg': 0.4, 'batch_size': 16, 'precision': 'fp32', 'channels_last': False, 'device': 'cpu', 'log_every': 0.1, 'checkpoint_every': 0.1, **training}
    return UNetParams(levels=3, filters=8, optimiser='adamw', learning_rate=5e-3, validate_every=0.2, training=t)

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

# Learning

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_learns_a_few_slices_by_heart(real, precision):
    torch.manual_seed(0)
    images = real.examples(6)
    model = Segmentation(params(precision=precision), augment=False)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    batch = torch.from_numpy(images).float() / 127.5 - 1
    for step in range(100):
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'): loss, _ = model.loss(batch, step)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    dice = dice_of_counts(confusion(annotation_to_classes(images[:, 4]), segment(model, images), np.zeros(6, int), 1))
    assert dice.min() > 0.9

def test_a_training_generalises_and_its_best_weights_are_kept(store, real, tmp_path):
    folder = train_segmenter(params(kimg=4), 'real', real, None, tmp_path/'run', seed=0, augment=False, progress=False)
    log = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    scores = [line['validation'] for line in log if 'validation' in line]
    model, (_, validation) = load_segmenter(folder), split_validation(real, 0.2, 0)
    assert validation_score(model, [validation]) == pytest.approx(max(scores), abs=1e-6)
    rows = evaluate_segmenter(model, store.where(split='test'))
    assert len(rows) == 2*3 and rows.dice.mean() > 0.7

@pytest.mark.parametrize('zscore', ['slice', 'foreground'])
def test_bf16_agrees_with_fp32_and_leaves_augmentation_alone(monkeypatch, real, zscore):
    torch.manual_seed(0)
    model, images, inputs, forward = Segmentation(params().model_copy(update={'zscore': zscore})), real.examples(8), [], Segmentation.forward
    monkeypatch.setattr(Segmentation, 'forward', lambda self, x, *more: inputs.append(x) or forward(self, x, *more))
    losses = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled): losses.append(model.loss(torch.from_numpy(images).float() / 127.5 - 1, 0)[0])
    assert torch.equal(*inputs) and losses[1].dtype == torch.float32 and abs(losses[0] - losses[1]) < 0.05

# What is shown

def test_no_subject_is_on_both_sides_of_the_validation_split(real):
    for seed in range(30):
        a, b = split_validation(real, 0.2, seed)
        assert not set(a.subjects) & set(b.subjects) and set(a.subjects) | set(b.subjects) == set(real.subjects) and len(b.subjects) == 2

def test_synthetic_images_are_split_by_image(synthetic):
    a, b = split_validation(synthetic, 0.2, 0)
    assert (len(a), len(b)) == (40, 10) and not set(a.slices.number) & set(b.slices.number)

def test_one_subject_is_not_enough(real):
    with pytest.raises(ValueError, match='cannot be split'): split_validation(real.where(subject='s0'))

def test_test_slices_are_refused(store):
    with pytest.raises(ValueError, match='test slices'): training_sources('real', store, None)

def seen(monkeypatch, *arguments):
    "Of each image that a training is shown whether it is synthetic; the stores that it validates on."
    shown, validated, loss, score = [], [], Segmentation.loss, training.validation_score
    def spy(self, batch, step): shown.append(batch[:, 0, 0, 0] > 0); return loss(self, batch, step)
    def spy_score(model, stores): validated.append(stores); return score(model, stores)
    monkeypatch.setattr(Segmentation, 'loss', spy); monkeypatch.setattr(training, 'validation_score', spy_score)
    train_segmenter(*arguments, seed=0, progress=False)
    return torch.cat(shown), validated

@pytest.mark.parametrize('mixture, share', [('real', 0), ('both', 0.5), ('synthetic', 1)])
def test_mixtures(monkeypatch, real, synthetic, tmp_path, mixture, share):
    "'both' sees as many of each, all see the same number, and 'synthetic' sees nothing real, not even to validate."
    shown, validated = seen(monkeypatch, params(kimg=0.64), mixture, real, synthetic, tmp_path/'run')
    assert len(shown) == 640 and abs(shown.float().mean() - share) < 0.01
    paths = {s.path for stores in validated for s in stores}
    assert validated and paths == {s.path for s in training_sources(mixture, real, synthetic)}

# Interruption

class Killed(Exception): "Stands for a killed process."

@pytest.mark.parametrize('optimiser', ['sgd', 'adamw'])
def test_killed_and_resumed_is_the_same(monkeypatch, real, synthetic, tmp_path, optimiser):
    p = params().model_copy(update={'optimiser': optimiser})
    whole = train_segmenter(p, 'both', real, synthetic, tmp_path/'whole', seed=3, progress=False)
    loss = Segmentation.loss
    def deadly(self, batch, step):
        if step == 17: raise Killed
        return loss(self, batch, step)
    with monkeypatch.context() as m:
        m.setattr(Segmentation, 'loss', deadly)
        with pytest.raises(Killed): train_segmenter(p, 'both', real, synthetic, tmp_path/'killed', seed=3, progress=False)
    with pytest.raises(TrainingError, match='not finished'): load_segmenter(tmp_path/'killed')
    resumed = train_segmenter(p, 'both', real, synthetic, tmp_path/'killed', seed=3, progress=False)
    assert (whole/'weights.safetensors').read_bytes() == (resumed/'weights.safetensors').read_bytes()
    other = train_segmenter(p, 'both', real, synthetic, tmp_path/'other', seed=4, progress=False)
    assert (whole/'weights.safetensors').read_bytes() != (other/'weights.safetensors').read_bytes()

# Augmentation

@pytest.mark.parametrize('p', [AugmentationParams(), code_augmentation(), AugmentationParams(rotation=(-180, 180), scale=(0.5, 1.5))], ids=['paper', 'code', 'wide'])
def test_image_and_annotation_stay_together(real, p):
    "An image made of its annotation still agrees with it, but for pixels at edges."
    classes = torch.from_numpy(annotation_to_classes(real.examples(24)[:, 4])).long()
    images, moved = Augmentation(p).geometry(classes[:, None].float().repeat(1, 4, 1, 1), classes, torch.Generator().manual_seed(0))
    inside = torch.nn.functional.max_pool2d(moved[:, None].float(), 3, 1, 1) == -torch.nn.functional.max_pool2d(-moved[:, None].float(), 3, 1, 1)
    assert (moved != classes).any() and inside.float().mean() > 0.5
    assert ((images[:, :1] - moved[:, None]).abs()[inside] < 0.5).float().mean() > 0.995
    assert set(moved.unique().tolist()) <= {0, 1, 2, 3}

def test_without_augmentation_nothing_changes(real):
    off = AugmentationParams(**{name: 0 for name in AugmentationParams.model_fields if name.endswith('probability')})
    images, classes = torch.rand(8, 4, 32, 32), torch.randint(0, 4, (8, 32, 32))
    same, untouched = Augmentation(off)(images, classes)
    assert torch.equal(same, images) and torch.equal(untouched, classes)

def test_augmentation_is_a_function_of_the_generator_and_leaves_its_input_alone():
    images, classes = torch.rand(16, 4, 32, 32), torch.randint(0, 4, (16, 32, 32))
    before = images.clone()
    a, b = (Augmentation(code_augmentation())(images, classes, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(images, before)

# Evaluation

def test_a_perfect_segmentation_counts_as_one(monkeypatch, store):
    monkeypatch.setattr(training, 'segment', lambda model, images: annotation_to_classes(images[:, 4]))
    rows = evaluate_segmenter(None, store.where(split='test'))
    assert list(rows.columns[:4]) == ['subject', 'class', 'dice', 'hausdorff']
    assert (rows.dice == 1).all() and (rows.hausdorff == 0).all()

def test_hausdorff_is_in_mm_of_the_store(monkeypatch, store):
    "A segmentation that is off by one slice is off by the distance of the slices."
    monkeypatch.setattr(training, 'segment', lambda model, images: np.roll(annotation_to_classes(images[:, 4]), 1, axis=0))
    rows = evaluate_segmenter(None, store.where(split='test'))
    assert (rows.dice < 1).all() and rows.hausdorff.min() >= 4 and (rows.hausdorff < 40).all()

def test_volume_dice_is_the_dice_of_validation(monkeypatch, store):
    "Counting by subject is Dice in 3D."
    rng = np.random.default_rng(0)
    noisy = lambda model, images: np.where(rng.random(images[:, 4].shape) < 0.1, 2, annotation_to_classes(images[:, 4])).astype(np.uint8)
    subject = store.where(subject='s8')
    annotation, found = annotation_to_classes(subject[:][:, 4]), noisy(None, subject[:])
    monkeypatch.setattr(training, 'segment', lambda model, images: found)
    assert np.allclose(evaluate_segmenter(None, subject).dice, dice_of_counts(confusion(annotation, found, np.zeros(12, int), 1))[0])
