"The progressive GAN and StyleGAN 1 against the official models: schedule, images, styles, logits, gradients and penalties."
import inspect
import json
import math
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from synthmr.generators import progressive_gan as pg, stylegan1 as sg
from synthmr.generators.layers import downsample, upsample

SIZE = dict(channels=5, channel_base=128, channel_max=16)
MODELS = {'pggan_32': (pg.generator_from_official, lambda: pg.ProgressiveGenerator(32, latents=16, **SIZE), lambda: pg.GrowingDiscriminator(32, **SIZE)),
          'stylegan1_32': (sg.generator_from_official, lambda **kw: sg.StyleGAN1Generator(32, latents=16, width=16, **SIZE, **kw), lambda: pg.GrowingDiscriminator(32, **SIZE, blur=True))}
PENALTIES = [0, 0.5]

@cache
def _load(path): return load_file(path)

@pytest.fixture(params=MODELS)
def name(request): return request.param

@pytest.fixture
def golden(shared, name): return _load(shared/'goldens'/f'{name}.safetensors')

@pytest.fixture
def generator(golden, name): return MODELS[name][0](official(golden, 'G'), MODELS[name][1]()).requires_grad_(False)

@pytest.fixture
def discriminator(golden, name): return pg.discriminator_from_official(official(golden, 'D'), MODELS[name][2]())

def official(golden, letter): return {k[2:]: v for k, v in golden.items() if k.startswith(f'{letter}.')}

def level_of(lod): return 5. - lod

def whole(images): return upsample(images, 32 // images.shape[-1])      # the official networks always give 32x32

def shown(images, lod): return downsample(images, 32 // pg.resolution_at(level_of(lod)))

def close(found, expected, tolerance=1e-4, at_least=1.):
    "Equal within a tolerance, relative to the largest value; prints the largest difference."
    print('largest difference', (found - expected).abs().max().item(), 'of', expected.abs().max().item())
    torch.testing.assert_close(found, expected, atol=tolerance * max(at_least, expected.abs().max().item()), rtol=0)

def lods(golden, what): return sorted(float(k.rpartition('lod')[2]) for k in golden if k.startswith(f'out.{what}.lod'))

# Both models

@pytest.mark.parametrize('file, key, growth, batch, rate', [
    ('pggan_32', 'training_schedule_official_preset_v2_1gpu_res256', pg.GrowthParams(), 8, 1e-3),
    ('stylegan1_32', 'training_schedule_official_ffhq_8gpu_res256', pg.GrowthParams(first_resolution=8, batch_sizes={8: 256, 16: 128, 32: 64, 64: 32}, learning_rates={128: 1.5e-3, 256: 2e-3}), 32, 1e-3)])
def test_training_schedule(shared, file, key, growth, batch, rate):
    rows = json.loads((shared/'goldens'/f'{file}.json').read_text())[key]
    for row in rows:
        level = pg.level_at(row['kimg'], growth, 256)
        assert math.isclose(level, 8 - row['lod'], rel_tol=1e-12) and pg.resolution_at(level) == row['resolution']
        assert pg.batch_size_at(row['kimg'], growth, 256, batch) == row['minibatch'] and pg.learning_rate_at(row['kimg'], growth, 256, rate) == row['G_lrate'] == row['D_lrate']
    assert len(rows) > 10

def test_images(golden, generator):
    found = lods(golden, 'img')
    for lod in found: close(whole(generator(golden['in.latents'], level_of(lod))), golden[f'out.img.lod{lod:g}'])
    close(generator(golden['in.latents']), golden['out.img.lod0'])
    assert len(found) >= 5

def test_logits(golden, discriminator):
    found = lods(golden, 'D_scores')
    with torch.no_grad():
        for lod in found: close(discriminator(shown(golden['in.images'], lod), level_of(lod)), golden[f'out.D_scores.lod{lod:g}'])
    assert len(found) == 6

def test_logits_of_two_groups(golden, discriminator):
    images = torch.cat([golden['in.images'], 0.5 * golden['in.images'].flip(0)])
    with torch.no_grad(): close(discriminator(images), golden['out.D_scores_batch8.lod0'])

def gradient(discriminator, golden, lod):
    images = golden['in.images'].clone().requires_grad_(True)
    return torch.autograd.grad(discriminator(images, level_of(lod)).sum(), images)[0]

@pytest.mark.parametrize('lod', PENALTIES)
def test_gradient_of_the_image(golden, discriminator, lod): close(gradient(discriminator, golden, lod), golden[f'out.D_grad_img.lod{lod:g}'], at_least=0)

@pytest.mark.parametrize('lod', PENALTIES)
def test_penalty_of_the_gradient(golden, name, discriminator, lod):
    squared = gradient(discriminator, golden, lod).square().sum((1, 2, 3))
    if name == 'stylegan1_32': close(squared, golden[f'out.r1_penalty.lod{lod:g}'], at_least=0)
    else:
        close(squared.sqrt(), golden[f'out.grad_norm.lod{lod:g}'], at_least=0)
        close(10 * (squared.sqrt() - 1).square(), golden[f'out.gradient_penalty.lod{lod:g}'], at_least=0)

def test_every_output_has_a_test(golden, name):
    tested = {'img', 'D_scores', 'D_scores_batch8', 'D_grad_img', *(('gradient_penalty', 'grad_norm', 'process_reals') if name == 'pggan_32' else
              ('r1_penalty', 'dlatents', 'img_psi0.7_cutoff8', 'img_psi0.7_cutoff4', 'img_fused_scale_true', 'img_noblur', 'D_scores_fused_scale_true', 'img_mix'))}
    assert {k[4:].partition('.lod')[0] for k in golden if k.startswith('out.')} == tested
    assert lods(golden, 'D_grad_img') == PENALTIES

def test_number_of_weights_of_the_golden(shared, name, generator, discriminator):
    counts = json.loads((shared/'goldens'/f'{name}.json').read_text())['num_params_this_config']
    assert [sum(p.numel() for p in m.parameters()) for m in (generator, discriminator)] == list(counts.values())

def test_number_of_weights_at_the_papers_size(shared, name):
    counts = json.loads((shared/'goldens'/'param_counts.json').read_text())
    with torch.device('meta'):
        G = pg.ProgressiveGenerator(256) if name == 'pggan_32' else sg.StyleGAN1Generator(256)
        D = pg.GrowingDiscriminator(256, blur=name == 'stylegan1_32')
    weights = lambda m: sum(p.numel() for p in m.parameters())
    if name == 'pggan_32': expected = counts['progressive_gan (TF1 G_paper/D_paper, fmap_base 8192, fmap_max 512, latent 512)']
    else:
        expected = counts['stylegan1 (TF1 G_style/D_basic, fmap_base 8192, fmap_max 512, z=w=512, 8 mapping layers)']
        expected['G'] = expected['G total (mapping+synthesis)']
        assert weights(G.mapping) == expected['G_mapping'] and weights(G.synthesis) == expected['G_synthesis']
    assert weights(G) == expected['G'] and weights(D) == expected['D']
    coarse = lambda m: weights(getattr(m, 'synthesis', m).images[:-1])
    assert weights(D) - coarse(D) == expected['D without FromRGB of lod>0'] and weights(G) - coarse(G) == next(v for k, v in expected.items() if k.startswith('G') and 'without ToRGB' in k)

def test_every_official_tensor_is_needed_and_none_is_unknown(golden, name):
    fill, build, judge = MODELS[name]
    for letter, read, make in (('G', fill, build), ('D', pg.discriminator_from_official, judge)):
        tensors, ignored = official(golden, letter), ('lod', 'G_synthesis/lod')
        for key in tensors.keys() - set(ignored):
            with pytest.raises(ValueError, match=f'^{key}: is missing'): read({k: v for k, v in tensors.items() if k != key}, make())
        with pytest.raises(ValueError, match='^4x4/Conv7/weight: no such weight'): read(tensors | {'4x4/Conv7/weight': torch.zeros(1)}, make())
        key = next(k for k in tensors if k.endswith('Conv0_up/weight' if letter == 'G' else 'Dense0/weight'))
        with pytest.raises(ValueError, match=f'^{key}: shape'): read(tensors | {key: tensors[key][:1]}, make())
        with pytest.raises(ValueError, match=f'^{key}: has 1 axes'): read(tensors | {key: tensors[key].flatten()}, make())

def test_low_precision_stays_near(golden, generator, discriminator):
    for level in (5., 4.5, 3.25):
        with torch.no_grad():
            image, logit = generator(golden['in.latents'], level), discriminator(shown(golden['in.images'], 5 - level), level)
            with torch.autocast('cpu', torch.bfloat16): low, low_logit = generator(golden['in.latents'], level), discriminator(shown(golden['in.images'], 5 - level), level)
        assert low.dtype == torch.float32 and (low - image).square().mean().sqrt() < 0.05 * image.std() and (low_logit.float() - logit).abs().max() < 0.05 * logit.abs().max()

def test_second_derivative(golden, discriminator):
    "Of the squared gradient with respect to a weight, against differences of it."
    D = discriminator.double()
    images = downsample(golden['in.images'].double()).requires_grad_(True)
    def penalty():
        g, = torch.autograd.grad(D(images, 3.5).sum(), images, create_graph=True)
        return g.square().sum()
    for weight in (D.images[1].weight, D.downs[0].weight, D.convs[0].weight, D.dense.weight):
        D.zero_grad(); penalty().backward()
        direction, exact = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), weight.grad
        found = []
        for step in (1e-5, -1e-5):
            weight.data += step * direction; found.append(penalty().item()); weight.data -= step * direction
        assert math.isclose((found[0] - found[1]) / 2e-5, (exact * direction).sum().item(), rel_tol=1e-2)     # kinks of the leaky ReLU; the statistics of the batch are fp32

# The progressive GAN alone

@pytest.mark.parametrize('name', ['pggan_32'], indirect=True)
def test_real_images_at_a_level(golden):
    for lod in lods(golden, 'process_reals'):
        reals = golden[f'in.reals_uint8.lod{lod:g}'] / 127.5 - 1
        close(whole(pg.fade(reals, level_of(lod))), golden[f'out.process_reals.lod{lod:g}'], 1e-5)

# StyleGAN 1 alone

only_stylegan1 = pytest.mark.parametrize('name', ['stylegan1_32'], indirect=True)

@only_stylegan1
def test_styles(golden, generator): close(generator.mapping(golden['in.latents']), golden['out.dlatents'], 1e-5)

@only_stylegan1
@pytest.mark.parametrize('cutoff', [8, 4])
def test_truncated_images(golden, generator, cutoff): close(generator(golden['in.latents'], truncation=0.7, cutoff=cutoff), golden[f'out.img_psi0.7_cutoff{cutoff}.lod0'])

@only_stylegan1
def test_mixed_styles(golden, generator):
    w = generator.mapping(golden['in.latents'][:2])
    close(generator.synthesis(torch.cat([w[0].expand(3, -1), w[1].expand(5, -1)])[None]), golden['out.img_mix.lod0'])

@only_stylegan1
def test_images_without_blur(golden):
    G = sg.generator_from_official(official(golden, 'G'), MODELS['stylegan1_32'][1](blur=False))
    with torch.no_grad(): close(G(golden['in.latents']), golden['out.img_noblur.lod0'])

@only_stylegan1
def test_images_by_transposed_convolutions(golden):
    G = sg.generator_from_official(official(golden, 'G'), MODELS['stylegan1_32'][1](), fused_from=8)
    with torch.no_grad(): close(G(golden['in.latents']), golden['out.img_fused_scale_true.lod0'])

@only_stylegan1
def test_logits_by_strided_convolutions(golden, discriminator):
    with torch.no_grad(): close(discriminator(golden['in.images']), golden['out.D_scores_fused_scale_true.lod0'])

@only_stylegan1
def test_kernels_are_mirrored_from_a_resolution_on(golden, generator):
    found = sg.generator_from_official(official(golden, 'G'), MODELS['stylegan1_32'][1](), fused_from=16).synthesis.ups
    for k, (a, b) in enumerate(zip(found, generator.synthesis.ups)): assert torch.equal(a.weight, b.weight.flip(2, 3) if k else b.weight)
    assert inspect.signature(sg.generator_from_official).parameters['fused_from'].default == 128
