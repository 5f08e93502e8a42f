"StyleGAN 2 against the official model: styles, images, logits, gradients and penalties."
import json

import pytest
import torch
from safetensors.torch import load_file

from synthmr.generators.adversarial import path_lengths, squared_gradient
from synthmr.generators.stylegan2 import StyleGAN2, StyleGAN2Discriminator, StyleGAN2Generator, StyleGAN2Params, from_official

FEATURES = {4: 32, 8: 32, 16: 32, 32: 16}

@pytest.fixture(scope='module')
def golden():
    from conftest import SHARED
    if not SHARED.is_dir(): pytest.skip(f'{SHARED} is not there')
    return load_file(SHARED/'goldens'/'stylegan2_32.safetensors')

def official(golden, letter): return {k[2:]: v for k, v in golden.items() if k.startswith(f'{letter}.')}

@pytest.fixture(scope='module')
def generator(golden): return from_official(official(golden, 'G'), StyleGAN2Generator(32, 5, 64, 64, 8, FEATURES)).eval().requires_grad_(False)

@pytest.fixture(scope='module')
def discriminator(golden): return from_official(official(golden, 'D'), StyleGAN2Discriminator(32, 5, FEATURES)).eval()

def close(found, expected, tolerance=1e-4): torch.testing.assert_close(found, expected, atol=tolerance * max(1, expected.abs().max().item()), rtol=tolerance)

@pytest.mark.parametrize('name, psi', [('out.w', 1.), ('out.w_psi0.7', 0.7)])
def test_styles(golden, generator, name, psi): close(generator.mapping(golden['in.z'], psi), golden[name])

@pytest.mark.parametrize('name, psi, noise', [('out.img', 1., 'const'), ('out.img_psi0.7', 0.7, 'const'), ('out.img_nonoise', 1., 'none')])
def test_images(golden, generator, name, psi, noise): close(generator(golden['in.z'], psi, noise), golden[name])

def test_mixed_styles(golden, generator):
    w = generator.mapping(golden['in.z'][:2])
    close(generator.synthesis(torch.cat([w[0].expand(3, -1), w[1].expand(5, -1)])[None]), golden['out.img_mix'])

def test_features_and_image_of_every_block(golden, generator):
    seen = {}
    hooks = [m.register_forward_hook(lambda m, i, out, key=key: seen.update({key: out})) for key, m in
             [(f'x{k}', c) for k, c in enumerate(generator.convs)] + [(f'image{k}', i) for k, i in enumerate(generator.images)] + [(f'double{k + 1}', d) for k, d in enumerate(generator.doubles)]]
    generator(golden['in.z'][:1])
    for hook in hooks: hook.remove()
    for k, size in enumerate((4, 8, 16, 32)):
        close(seen[f'x{k}'], golden[f'mid.G.b{size}.x'])
        close(seen[f'image{k}'] + (seen[f'double{k}'] if k else 0), golden[f'mid.G.b{size}.img'])

@pytest.mark.parametrize('name, images', [('out.D_logits', ['out.img']), ('out.D_logits_psi0.7', ['out.img_psi0.7']), ('out.D_logits_batch8', ['out.img', 'out.img_psi0.7'])])
def test_logits(golden, discriminator, name, images):
    with torch.no_grad(): close(discriminator(torch.cat([golden[i] for i in images])), golden[name])

def test_features_of_the_discriminator(golden, discriminator):
    seen = []
    hooks = [b.register_forward_hook(lambda m, i, out: seen.append(out[:1])) for b in discriminator.blocks]
    with torch.no_grad(): logits = discriminator(golden['out.img'])
    for hook in hooks: hook.remove()
    for found, size in zip(seen, (32, 16, 8)): close(found, golden[f'mid.D.b{size}'])
    close(logits[:1], golden['mid.D.b4'])

def test_gradient_of_the_image_and_r1(golden, discriminator):
    penalty, _ = squared_gradient(discriminator, golden['out.img'])
    close(penalty, golden['out.r1_penalty'], 1e-3)
    images = golden['out.img'].clone().requires_grad_(True)
    close(torch.autograd.grad(discriminator(images).sum(), images)[0], golden['out.D_grad_img'], 1e-3)

def test_gradient_of_r1(golden, discriminator):
    "The second derivative, with gamma 8 as the golden has it."
    discriminator.zero_grad()
    (squared_gradient(discriminator, golden['out.img'])[0].mean() * 8 / 2).backward()
    for ours, name in ((discriminator.from_image, 'b32.fromrgb'), (discriminator.blocks[2].conv1, 'b8.conv1')): close(ours.weight.grad, golden[f'out.r1_grad.{name}.weight'], 1e-3)

def test_path_lengths(golden, generator):
    ws = generator.mapping(golden['in.z'])[:, None].repeat(1, 8, 1).requires_grad_(True)
    images = generator.synthesis(ws)
    close(path_lengths(images, ws, golden['in.pl_noise'] * 32), golden['out.pl_lengths'], 1e-3)
    close(torch.autograd.grad((images * golden['in.pl_noise']).sum(), ws)[0], golden['out.pl_grads'], 1e-3)

def test_number_of_weights(shared):
    counts = json.loads((shared/'goldens'/'param_counts.json').read_text())['stylegan2/3 (PyTorch, stylegan3 repo)']
    for base in (32768, 16384):
        with torch.device('meta'): model = StyleGAN2(StyleGAN2Params(channel_base=base), 256)
        def count(module): return sum(p.numel() for p in module.parameters())
        generator, discriminator = counts[f'stylegan2_G_cbase{base}'], next(v for k, v in counts.items() if k.startswith(f'stylegan2_D_cbase{base}'))
        assert (count(model.generator), count(model.generator.mapping), model.generator.styles) == (generator['total'], generator['mapping'], generator['num_ws'])
        assert count(model.discriminator) == discriminator['total']
