"The Swin transformer: its published size, its loss and schedule, what its training shows it, and that it is one of two segmenters behind the same door."
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss

from tiny import DATA

from synthmr.data.prepare import example_store
from synthmr.params import ParamsError, check, fingerprint
from synthmr.segmenters.augmentation import Augmentation, AugmentationParams, warp
from synthmr.segmenters.elastic import SwinAugmentation, SwinAugmentationParams, displacements
from synthmr.segmenters.swin import Swin, SwinParams, SwinSegmentation, decay_groups, dice_cross_entropy, validation_loss, warmup_then_linear
from synthmr.segmenters.training import (Segmentation, UNetParams, confusion, dice_of_counts, evaluate_segmenter, load_segmenter, segment, split_validation, train_segmenter,
                                         training_length, unpack)
from synthmr.batches import batch_order
from synthmr.slices import annotation_to_classes, to_float
from synthmr.studies.evaluation import make_evaluation
from synthmr.studies.runs import SegmenterRun, make_data, make_generator, make_segmenter
from synthmr.studies.study import Study
from synthmr.training import TrainingError

STILL = dict(rotation=(0, 0), scale=(1, 1), flip_probability=0, gamma=(1, 1), displacement=0)

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "Simulated subjects at 16 x 16."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SYNTHMR_HOME', str(tmp_path_factory.mktemp('home')))
        return example_store(16, subjects=6)

@pytest.fixture(scope='module')
def real(store): return store.where(split='train')

def params(**more):
    "A tiny transformer and a short training."
    training = {'precision': 'fp32', 'device': 'cpu', 'log_every': 0.05, 'checkpoint_every': 0.1, **more.pop('training', {})}
    return SwinParams(**{**dict(patch=2, window=4, channels=8, depths=(1, 2, 1), heads=(1, 2, 2), drop_path=0.1, head_channels=16, auxiliary_channels=8, learning_rate=3e-3, warmup=5, epochs=2,
                                augmentation={'displacement': 0.5}), **more, 'training': training})

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

# The network

@pytest.fixture(scope='module')
def base():
    "The paper's network, without memory for its weights."
    with torch.device('meta'): return Swin(SwinParams())

@pytest.mark.parametrize('size, first', [(224, 56), (256, 64)])
def test_stages_are_the_published_ones(base, size, first):
    with torch.device('meta'):
        x = torch.empty(2, 4, size, size)
        assert [tuple(f.shape) for f in base.features(x)] == [(2, 128*2**s, first // 2**s, first // 2**s) for s in range(4)]
        assert [tuple(y.shape) for y in base.train()(x)] == [(2, 4, size, size)]*2 and tuple(base.eval()(x).shape) == (2, 4, size, size)

def test_number_of_weights_is_that_of_swin_base(base):
    """Published: 88 million with a classifier of 1000 classes. Counted here from the architecture: patches and their norm, blocks of attention with its
    position biases and an MLP of four times the width, mergers; and a norm at the end of each of the four stages."""
    def block(c, heads): return 2*2*c + 4*(c*c + c) + 13*13*heads + (4*c*c + 4*c) + (4*c*c + c)
    widths, depths, heads = (128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32)
    counted = 4*16*128 + 128 + 2*128 + sum(n*block(c, h) for c, n, h in zip(widths, depths, heads)) + sum(2*4*c + 4*c*2*c for c in widths[:-1]) + sum(2*c for c in widths)
    assert sum(p.numel() for p in base.transformer.parameters()) == counted
    assert abs(counted + 1024*1000 + 1000 - 87.8e6) < 0.05e6

def test_drop_path_grows_to_its_value(base):
    rates = [m.drop_prob for m in base.transformer.modules() if type(m).__name__.endswith('DropPath')]
    assert max(rates) == pytest.approx(0.3) and sorted(rates) == rates and rates[0] == pytest.approx(0.3/23)    # the first of 24 blocks has none

def test_a_slice_of_any_size_comes_back_in_its_size():
    net = Swin(params()).eval()
    for shape in ((16, 16), (18, 22)): assert net(torch.rand(1, 4, *shape)).shape == (1, 4, *shape)

def test_the_module_is_light_and_needs_no_torchvision():
    program = ('import sys; sys.modules["torchvision"] = None\nimport synthmr.segmenters.training; assert "transformers" not in sys.modules\n'
               'from synthmr.segmenters.swin import Swin, SwinParams\nSwin(SwinParams(channels=4, depths=(1, 1, 1), heads=(1, 1, 1)))')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_stages_that_cannot_be_are_refused():
    for wrong, message in (({'heads': [1, 2]}, '2 stages, but depths has 4'), ({'channels': 6, 'heads': [4, 8, 16, 32]}, 'do not divide'), ({'depths': [2, 2], 'heads': [1, 1]}, 'at least 3')):
        with pytest.raises(ParamsError, match=message): check(SwinParams, wrong)

def test_initial_weights():
    torch.manual_seed(0)
    linear = {kind: torch.cat([m.weight.flatten() / (1 if kind == 'published' else m.in_features**-0.5) for m in Swin(params(initial_weights=kind)).modules() if isinstance(m, torch.nn.Linear)])
              for kind in ('published', 'fan_in')}
    assert SwinParams().initial_weights == 'published' and linear['published'].std().item() == pytest.approx(0.02, rel=0.05) and linear['fan_in'].std().item() == pytest.approx(3**-0.5, rel=0.05)

# Loss, decay, schedule

@pytest.mark.parametrize('case', ['all classes', 'no tumour', 'sure', 'bf16'])
def test_loss_is_monais(case):
    torch.manual_seed(0)
    logits, classes = torch.randn(3, 4, 24, 24) * (20 if case == 'sure' else 2), torch.randint(0, 4, (3, 24, 24))
    if case == 'no tumour': classes[1:] = 0
    if case == 'bf16': logits = logits.bfloat16()
    theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)(logits.float(), classes[:, None])
    assert dice_cross_entropy(logits, classes)[0].item() == pytest.approx(theirs.item(), abs=1e-5)

def test_both_heads_count(real):
    torch.manual_seed(0)
    batch, model = to_float(torch.from_numpy(real[:4])), SwinSegmentation(params(drop_path=0), augment=False)
    losses = [dice_cross_entropy(y, unpack(batch)[1])[0] for y in model(unpack(batch)[0])]
    assert model.loss(batch, 0)[0].item() == pytest.approx((losses[0] + 0.4*losses[1]).item(), abs=1e-5)

def test_norms_and_position_biases_do_not_decay(base):
    decaying, spared = decay_groups(base, 0.01)
    names = {id(p): name for name, p in base.named_parameters()}
    found = {names[id(p)] for p in spared['params']}
    assert (decaying['weight_decay'], spared['weight_decay']) == (0.01, 0) and len(decaying['params']) + len(spared['params']) == len(names)
    assert found == {name for name in names.values() if 'norm' in name or 'relative_position_bias_table' in name}
    assert sum('table' in name for name in found) == 24 and any('batch_norm' in name for name in found)     # in the transformer and in the heads
    spec = SwinSegmentation(params(training={'kimg': 1})).phases()[0].optimizer.defaults
    assert spec['betas'] == (0.9, 0.999)

def test_warmup_then_linear():
    steps = 10_000
    factor = np.array([warmup_then_linear(s, steps) for s in range(steps)])
    assert factor[0] == 1e-6 and factor[1500] == 1 == factor.max() and factor[-1] == pytest.approx(1/8500)
    assert np.allclose(np.diff(factor[:1501]), (1 - 1e-6)/1500) and np.allclose(np.diff(factor[1500:]), -1/8500)

def test_a_training_follows_the_schedule(real, tmp_path):
    p = params(training={'kimg': 0.16, 'batch_size': 8, 'log_every': 0.008}, validate_every=10)
    log = [json.loads(line) for line in (train_segmenter(p, 'real', real, None, tmp_path/'run', 0, progress=False)/'log.jsonl').read_text().splitlines()]
    assert [line['segmenter/learning_rate'] for line in log] == pytest.approx([warmup_then_linear(s, 20, 5) for s in range(20)], rel=1e-5)

def test_a_training_within_the_warmup_is_refused(real, tmp_path):
    with pytest.raises(ValueError, match='warmup: 1500 iterations, but training has only'): train_segmenter(params(warmup=1500), 'real', real, None, tmp_path/'run', 0, progress=False)

# Epochs

def test_the_last_incomplete_batch_is_dropped(monkeypatch, real, tmp_path):
    "No epoch shows an image twice, each has whole batches, validation follows each."
    shown, loss = [], SwinSegmentation.loss
    def spy(self, batch, step): shown.append(batch); return loss(self, batch, step)
    monkeypatch.setattr(SwinSegmentation, 'loss', spy)
    folder = train_segmenter(params(), 'real', real, None, tmp_path/'run', 0, augment=False, progress=False)
    training, _ = split_validation(real, 0.2, 0)
    batches = len(training) // 8
    assert len(training) % 8 and len(shown) == 2*batches and {len(b) for b in shown} == {8}
    for epoch in (shown[:batches], shown[batches:]):
        images = {x.numpy().tobytes() for b in epoch for x in b}
        assert len(images) == 8*batches
    lines = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'validation' in line] == [batches, 2*batches]

def test_epochs_of_two_sources_and_of_given_length():
    timed, per_epoch = training_length(params(epochs=3), [50, 101])
    assert per_epoch == 200 and timed.training.steps == 75 and timed.validate_every == 0.2
    assert training_length(params(training={'kimg': 5}), [50])[0].training.kimg == 5
    for n in range(8, 20_000, 8): assert training_length(params(epochs=25), [n])[0].training.steps == 25*n/8
    with pytest.raises(ValueError, match='7 training images make no batch of 8'): training_length(params(), [7])

def test_cut_epochs_resume_anywhere():
    order = [b.tolist() for (_, b), _ in zip(batch_order([21], 4, seed=5, per_epoch=20), range(15))]
    for k in (1, 4, 5, 7): assert [b.tolist() for (_, b), _ in zip(batch_order([21], 4, 5, 4*k, per_epoch=20), range(15 - k))] == order[k:]
    assert all(len(set(sum(order[e:e + 5], []))) == 20 for e in (0, 5, 10)) and set(sum(order, [])) == set(range(21))

# Learning

def test_learns_a_few_slices_by_heart(store):
    torch.manual_seed(0)
    images = store.largest_tumours()[:4]
    p = params(initial_weights='fan_in', channels=16, patch=1, drop_path=0, head_channels=32, learning_rate=4e-3, training={'kimg': 1})
    model, batch = SwinSegmentation(p, augment=False), to_float(torch.from_numpy(images))
    optimizer = model.phases()[0].optimizer
    for step in range(60): loss, _ = model.loss(batch, step); optimizer.zero_grad(); loss.backward(); optimizer.step()
    dice = dice_of_counts(confusion(annotation_to_classes(images[:, 4]), segment(model, images), np.zeros(len(images), int), 1))
    assert np.nanmin(dice) > 0.8, dice

def test_a_training_learns_and_the_lowest_validation_loss_is_kept(store, real, tmp_path):
    folder = train_segmenter(params(epochs=4), 'real', real, None, tmp_path/'run', 0, augment=False, progress=False)
    scores = [line['validation'] for line in map(json.loads, (folder/'log.jsonl').read_text().splitlines()) if 'validation' in line]
    model, (_, aside) = load_segmenter(folder), split_validation(real, 0.2, 0)
    assert isinstance(model, SwinSegmentation) and validation_loss(model, [aside]) == pytest.approx(-max(scores), abs=1e-5)
    assert len(scores) == 4 and max(scores) > scores[0] + 0.05
    test = store.where(split='test')
    rows = evaluate_segmenter(model, test)
    assert len(rows) == 3*test.slices.subject.nunique() and rows.dice.dropna().between(0, 1).all()

def test_what_is_kept_is_not_simply_the_last(monkeypatch, real, tmp_path):
    from synthmr.segmenters import training
    losses, seen = iter([3., 1., 2.]), []
    def told(model, stores): seen.append({k: v.clone() for k, v in model.network.state_dict().items()}); return next(losses)
    monkeypatch.setattr(training, 'validation_loss', told)
    folder = train_segmenter(params(epochs=3), 'real', real, None, tmp_path/'run', 0, progress=False)
    kept = load_segmenter(folder).network.state_dict()
    assert [all(kept[k].equal(w[k]) for k in kept) for w in seen] == [False, True, False]

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_precisions_agree(real, precision):
    torch.manual_seed(0)
    model, batch = SwinSegmentation(params(training={'precision': precision}, drop_path=0), augment=False), to_float(torch.from_numpy(real[:6]))
    plain = model.loss(batch, 0)[0]
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'): loss = model.loss(batch, 0)[0]
    assert loss.dtype == torch.float32 and abs(loss - plain) < 0.05
    assert segment(model, real[:6]).shape == (6, 16, 16)

class Killed(Exception): "Stands for a killed process."

def test_killed_and_resumed_is_the_same(monkeypatch, real, tmp_path):
    p = params()
    whole = train_segmenter(p, 'real', real, None, tmp_path/'whole', 3, progress=False)
    loss = SwinSegmentation.loss
    steps = training_length(p, [len(split_validation(real, 0.2, 3)[0])])[0].training.steps
    def deadly(self, batch, step):
        if step == steps - 2: raise Killed
        return loss(self, batch, step)
    with monkeypatch.context() as m:
        m.setattr(SwinSegmentation, 'loss', deadly)
        with pytest.raises(Killed): train_segmenter(p, 'real', real, None, tmp_path/'killed', 3, progress=False)
    assert list((tmp_path/'killed').glob('checkpoint-*'))
    with pytest.raises(TrainingError, match='not finished'): load_segmenter(tmp_path/'killed')
    resumed = train_segmenter(p, 'real', real, None, tmp_path/'killed', 3, progress=False)
    assert (whole/'weights.safetensors').read_bytes() == (resumed/'weights.safetensors').read_bytes()
    other = train_segmenter(p, 'real', real, None, tmp_path/'other', 4, progress=False)
    assert (whole/'weights.safetensors').read_bytes() != (other/'weights.safetensors').read_bytes()

# Augmentation

def test_without_amplitude_nothing_changes(real):
    images, classes = unpack(to_float(torch.from_numpy(real[:8])))
    same, untouched = SwinAugmentation(SwinAugmentationParams(**STILL))(images, classes)
    assert torch.equal(same, images) and torch.equal(untouched, classes)
    same, untouched = warp(images, classes, torch.zeros(8), torch.ones(8, 2), displacements(torch.zeros(8, 3, 3, 2), 16))    # read all the same
    assert torch.allclose(same, images, atol=1e-5) and torch.equal(untouched, classes)

@pytest.mark.parametrize('p', [SwinAugmentationParams(), SwinAugmentationParams(displacement=4, points=5, rotation=(-180, 180))], ids=['paper', 'wild'])
def test_image_and_annotation_stay_together(p):
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing='ij')
    classes = sum(((x - 0.2)**2 + y**2 < r).long() for r in (0.05, 0.15, 0.3))[None].repeat(24, 1, 1)
    images, moved = SwinAugmentation(p).geometry(classes[:, None].float().repeat(1, 4, 1, 1), classes, torch.Generator().manual_seed(0))
    pool = torch.nn.functional.max_pool2d
    inside = pool(moved[:, None].float(), 3, 1, 1) == -pool(-moved[:, None].float(), 3, 1, 1)
    assert (moved != classes).any() and inside.float().mean() > 0.5 and set(moved.unique().tolist()) <= {0, 1, 2, 3} and moved.dtype == torch.int64
    assert ((images[:, :1] - moved[:, None]).abs()[inside] < 0.5).float().mean() > 0.995

def test_flips_alone_are_exact():
    images, classes = torch.rand(200, 4, 8, 8), torch.randint(0, 4, (200, 8, 8))
    flipped, annotation = SwinAugmentation(SwinAugmentationParams(**{**STILL, 'flip_probability': 0.5})).geometry(images, classes, torch.Generator().manual_seed(0))
    kinds = [sum(torch.allclose(flipped[i], turn(images)[i], atol=1e-5) and torch.equal(annotation[i], turn(classes)[i]) for i in range(200))
             for turn in (lambda x: x, lambda x: x.flip(-1), lambda x: x.flip(-2))]
    assert sum(kinds) == 200 and abs(kinds[0] - 100) < 25 and abs(kinds[1] - 50) < 22

def test_augmentation_is_a_function_of_the_generator_and_leaves_its_input_alone():
    images, classes = torch.rand(16, 4, 32, 32), torch.randint(0, 4, (16, 32, 32))
    before = images.clone()
    a, b, c = (SwinAugmentation(SwinAugmentationParams())(images, classes, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0]) and torch.equal(images, before)

def test_gamma_keeps_the_range_and_the_background():
    images = torch.rand(8, 4, 16, 16); images[:, :, 0] = 0
    changed = SwinAugmentation(SwinAugmentationParams()).intensities(images, torch.Generator().manual_seed(0))
    assert (changed[:, :, 0] == 0).all() and torch.allclose(changed.amax((2, 3)), images.amax((2, 3))) and (changed != images).any()

# One door

def test_the_unets_names_and_augmentation_are_what_they_were():
    "Names of runs are hashes of parameters: the second family must not rename what the first has trained."
    data = {'dataset': 'example', 'simulated': {'subjects': 6, 'spacing': 4}, 'resolution': 32}
    assert fingerprint(UNetParams()) == 'a9710705' and SegmenterRun(data=data).name == 'unet-real-seed0-64386245'
    assert SegmenterRun(data=data, segmenter={'levels': 3}).name == SegmenterRun(data=data, segmenter={'kind': 'unet', 'levels': 3}).name == SegmenterRun(data=data, segmenter=UNetParams(levels=3)).name
    images, classes = torch.linspace(0, 1, 4*4*256).view(4, 4, 16, 16), torch.arange(4*256).view(4, 16, 16) % 4
    moved, annotation = Augmentation(AugmentationParams()).geometry(images, classes, torch.Generator().manual_seed(0))
    assert moved.double().sum().item() == pytest.approx(1818.4168125616598, rel=1e-6) and annotation.sum().item() == 1314

def test_a_run_holds_either():
    data = {'dataset': 'example', 'simulated': {'subjects': 6, 'spacing': 4}, 'resolution': 32}
    swin, unet = SegmenterRun(data=data, segmenter={'kind': 'swin'}), SegmenterRun(data=data)
    assert swin.segmenter == SwinParams() and swin.label.startswith('swin-real') and unet.label.startswith('unet-real') and swin.name != unet.name
    for wrong, message in (({'kind': 'vit'}, "segmenter.kind: unknown, 'vit'; one of 'unet', 'swin'"), ({'kind': 'swin', 'levels': 3}, 'segmenter.levels: unknown key'),
                           ({'lvels': 3}, "segmenter.lvels: unknown key; did you mean 'levels'?")):
        with pytest.raises(ParamsError, match=message): check(SegmenterRun, {'data': data, 'segmenter': wrong})

def test_a_trained_unet_is_found_behind_the_same_door(real, tmp_path):
    p = UNetParams(levels=2, filters=4, optimiser='adamw', validate_every=1, training={'kimg': 0.05, 'batch_size': 8, 'precision': 'fp32', 'device': 'cpu'})
    folder = train_segmenter(p, 'real', real, None, tmp_path/'run', 0, progress=False)
    assert isinstance(load_segmenter(folder), Segmentation) and 'per_epoch' not in json.loads((folder/'config.json').read_text())

def test_a_study_whose_first_segmenter_is_a_swin_judges_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv('SYNTHMR_HOME', str(tmp_path))
    data = DATA
    generator = {'kind': 'stylegan2', 'latents': 8, 'width': 8, 'mapping_layers': 1, 'channel_base': 64, 'channel_max': 8, 'path_weight': 0, 'training': {'kimg': 0.1, 'batch_size': 8}}
    segmenter = {'kind': 'swin', 'patch': 2, 'window': 4, 'channels': 8, 'depths': [1, 1, 1], 'heads': [1, 2, 4], 'head_channels': 8, 'auxiliary_channels': 8, 'warmup': 2, 'training': {'kimg': 0.1}}
    study = Study.model_validate({'data': data, 'generators': [{'data': data, 'generator': generator, 'images': 40}], 'segmenters': [{'data': data, 'segmenter': segmenter}], 'seeds': [0],
                                  'evaluation': {'memorization': {'percentile': 90}, 'fidelity': [{'replicates': 10}]}})
    run = study.evaluations[0]
    make_data(run.data); make_generator(run.generator); make_segmenter(run.segmenter)
    rows = make_evaluation(run, progress=False)[0]
    distances = rows[rows.metric == 'frechet_distance']
    assert run.segmenter.segmenter.kind == 'swin' and distances.value.notna().all() and set(distances.layer) == {'network.head.bottleneck'}
