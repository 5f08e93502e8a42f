"The four GANs as the study trains them: every loss, resume, precision, growth, and images that are a function of their number."
import json

import pytest
import torch

from synthmr.generators.families import FAMILIES, build_generator
from synthmr.generators.progressive_gan import GrowthParams
from synthmr.slices import StoreWriter
from synthmr.training import TrainingParams, load_weights, train

GROWTH = GrowthParams(first_resolution=8, train_kimg=0.06, fade_kimg=0.06, batch_sizes={8: 16})
COMMON = dict(latents=16, channel_base=128, channel_max=16, training=TrainingParams(kimg=0.3, batch_size=8, ema_kimg=0.05, log_every=0.05, checkpoint_every=0.1, device='cpu'))
MODELS = {'progressive_gan': dict(growth=GROWTH), 'stylegan1': dict(growth=GROWTH, width=16, mapping_layers=2), 'stylegan2': dict(width=16, mapping_layers=2, r1_every=4, path_every=2),
          'stylegan3': dict(width=16, layers=6, margin=2, r1_every=4)}

def model(kind: str, seed: int=0, **changed):
    "A small GAN of that kind."
    torch.set_num_threads(1)
    params = FAMILIES[kind][0](**{**COMMON, **MODELS[kind], **changed})
    return build_generator(params, 16, seed)

def trained(gan, store, folder, **kw):
    "The GAN after its training."
    train(gan, [store], gan.params.training, folder, 1, config=gan.params, progress=False, **kw)
    load_weights(gan, folder)
    return gan.eval()

def lines(folder): return [{k: v for k, v in json.loads(l).items() if k != 'seconds'} for l in (folder/'log.jsonl').read_text().splitlines()]

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "Smooth noise in the place of slices."
    noise = torch.nn.functional.interpolate(torch.randn(40, 5, 4, 4, generator=torch.Generator().manual_seed(0)), 16, mode='bilinear')
    with StoreWriter(tmp_path_factory.mktemp('gans')/'store', {'resolution': 16, 'simulated': True}) as writer:
        images = (127.5 + 60 * noise).clamp(0, 255).byte().numpy()
        images[:, 4] = images[:, 4] // 64 * 51
        writer.append('all', images, [dict(subject='a', z=z, split='train', tumour=1) for z in range(40)])
        return writer.finish()

@pytest.mark.parametrize('kind', MODELS)
def test_every_weight_learns_and_the_average_is_kept(kind, store, tmp_path):
    gan = model(kind)
    before = {name: p.detach().clone() for name, p in gan.named_parameters()}
    trained(gan, store, tmp_path/'run')
    still = {name for name, p in gan.named_parameters() if p.equal(before[name])}
    unused = {name for name in before if '.images.0.' in name and kind in ('progressive_gan', 'stylegan1')}     # image layers of 4 pixels: these networks begin at 8
    assert still == unused
    names = {name for line in lines(tmp_path/'run') for name in line}
    assert {'generator/loss', 'discriminator/loss', 'discriminator/real', 'discriminator/fake'} <= names
    assert {'progressive_gan': 'discriminator/penalty', 'stylegan1': 'discriminator/sign', 'stylegan2': 'path/length', 'stylegan3': 'r1/loss'}[kind] in names
    assert ('r1/loss' in names) == (kind in ('stylegan2', 'stylegan3'))

@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('changed', [{}, dict(annotation='one_hot', annotation_gain=2., haar=True, mirrored=True, augmentation=dict(initial=0.5))], ids=['plain', 'departures'])
def test_interrupted_and_resumed_is_the_same(kind, changed, store, tmp_path):
    "Bit for bit, in bf16, whatever resolution the network had grown to."
    changed = changed | dict(training=COMMON['training'].model_copy(update={'precision': 'bf16', 'accumulate': 2}))
    if kind in ('progressive_gan', 'stylegan1') and changed.get('haar'): changed['growth'] = GROWTH.model_copy(update={'first_resolution': 4, 'batch_sizes': {4: 16}})
    class Stop(Exception): pass
    def run(name, stop=None):
        count = iter(range(10**6))
        def look(batch):
            if next(count) == stop: raise Stop
            return batch
        gan = model(kind, **changed)
        try: trained(gan, store, tmp_path/name, prepare_batch=look)
        except Stop: pass
        return gan
    whole = run('whole'); run('cut', 45); resumed = run('cut')
    assert all(a.equal(b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert lines(tmp_path/'whole') == lines(tmp_path/'cut')
    assert torch.equal(whole.generate(3, range(4)), resumed.generate(3, range(4)))

@pytest.mark.parametrize('kind', MODELS)
def test_an_image_is_a_function_of_its_number(kind):
    gan = model(kind, annotation='one_hot', training=COMMON['training'].model_copy(update={'precision': 'bf16'})).eval()
    images = gan.generate(5, range(40))
    assert images.shape == (40, 5, 16, 16) and images.isfinite().all() and images.std(0).mean() > 1e-3
    assert torch.equal(gan.generate(5, [33, 7]), images[[33, 7]]) and not torch.equal(gan.generate(6, [7])[0], images[7])
    grey = torch.tensor([0., 51, 102, 204]) / 127.5 - 1
    assert torch.isclose(images[:, 4, :, :, None], grey, atol=1e-6).any(-1).all()     # the likeliest class

@pytest.mark.parametrize('kind', ['progressive_gan', 'stylegan1'])
def test_growth(kind, store, tmp_path):
    "The resolution, the batch and the forgetting of the optimisers follow the images seen; a training that ends early gives its last level, enlarged."
    gan = model(kind)
    seen, remembered, begin = [], [], gan.begin_step
    def watch(images):
        before = gan.reached.item(); begin(images)
        seen.append((images, gan.level)); remembered.append((gan.reached.item() != before, any(o.state for o in gan.optimizers)))
    gan.begin_step = watch
    trained(gan, store, tmp_path/'run')
    assert [level for images, level in seen if images <= 60] == [3.] * 4 and seen[-1][1] == 4. and any(3 < level < 4 for _, level in seen)
    assert [b - a for (a, _), (b, _) in zip(seen, seen[1:])] == [16 if level == 3 else 8 for _, level in seen[:-1]]
    assert [grown for grown, _ in remembered].count(True) == 2 and not any(full for grown, full in remembered if grown)
    short = model(kind, training=COMMON['training'].model_copy(update={'kimg': 0.05}))
    trained(short, store, tmp_path/'short')
    images = short.generate(0, range(4))
    assert images.shape[-1] == 16 and torch.equal(images[..., ::2, ::2], images[..., 1::2, 1::2])

def test_learning_rate_by_resolution(store, tmp_path):
    gan = model('stylegan1', growth=GROWTH.model_copy(update={'learning_rates': {8: 2e-3}}), generator_rate=1e-3)
    trained(gan, store, tmp_path/'run')
    factors = [line['generator/learning_rate'] for line in lines(tmp_path/'run')]
    assert factors[0] == 2 and factors[-1] == 1

def test_running_means_move_once_a_step(store, tmp_path):
    "The mean style follows the discriminator's phase alone."
    gan, calls = model('stylegan2', mixing=0.), []
    track = gan.generator.mapping.track
    gan.generator.mapping.track = lambda w: (calls.append(len(w)), track(w))
    trained(gan, store, tmp_path/'run')
    assert len(calls) == gan.params.training.steps and gan.generator.mapping.average.abs().max() > 0

def test_the_trained_average_paints_better_than_the_beginning(store, tmp_path):
    "Some steps bring the mean image nearer to the data's."
    gan = model('stylegan2', training=COMMON['training'].model_copy(update={'kimg': 2.}), r1_gamma=0.1, path_weight=0.)
    mean = torch.from_numpy(store[:]).float().mean(0) / 127.5 - 1
    before = (gan.eval().generate(0, range(64)).mean(0) - mean).square().mean()
    after = (trained(gan.train(), store, tmp_path/'run').generate(0, range(64)).mean(0) - mean).square().mean()
    assert after < 0.5 * before

def test_blur_of_configuration_r_fades(store):
    gan = model('stylegan3', rotation=True, blur_sigma=2., blur_kimg=0.1)
    sigmas = []
    for images in (0, 50, 100, 1000): gan.begin_step(images); sigmas.append(gan.sigma)
    assert sigmas == [2., 1., 0., 0.]
    images = torch.randn(4, 5, 16, 16)
    gan.begin_step(0); blurred = gan.judge(images)
    gan.begin_step(1000); assert not torch.allclose(blurred, gan.judge(images))

def test_lazy_regularisation_keeps_its_strength():
    "R1 at every fourth step, four times as strong: the mean over steps is that of every step."
    lazy, eager = (model('stylegan2', r1_every=n) for n in (4, 1))
    batch = torch.randn(8, 5, 16, 16)
    assert torch.isclose(lazy.r1_loss(batch, 0)[0], 4 * eager.r1(batch), rtol=1e-5)
    assert [p.name for p in eager.phases()] == ['generator', 'path', 'discriminator'] and [(p.name, p.every) for p in lazy.phases()] == [('generator', 1), ('path', 2), ('discriminator', 1), ('r1', 4)]

@pytest.mark.parametrize('resolution', [12, 4])
def test_resolutions_that_cannot_be_are_refused(resolution):
    with pytest.raises(ValueError, match='power of two'): build_generator(FAMILIES['stylegan2'][0](), resolution, 0)
