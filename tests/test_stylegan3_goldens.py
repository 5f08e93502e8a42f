"StyleGAN 3's generator, configurations T and R, against the official one: plan, filters, styles, every layer, images, trackers, blur."
import json

import pytest
import torch
from safetensors.torch import load_file

from synthmr.generators.stylegan3 import StyleGAN3Generator, blur, generator_from_official, synthesis_layers, transformation

DECAY = 0.5**(32 / 20000)

@pytest.fixture(params=['t', 'r'])
def golden(request, shared):
    "Facts and tensors of one configuration."
    path = shared/'goldens'/f'stylegan3{request.param}_32'
    return json.loads(path.with_suffix('.json').read_text()), load_file(path.with_suffix('.safetensors'))

@pytest.fixture
def tensors(golden): return golden[1]

def make(rotation: bool, **options) -> StyleGAN3Generator:
    "A generator of the goldens' size."
    return StyleGAN3Generator(32, 5, 64, 64, 2, 512, 32, rotation, DECAY, **options)

@pytest.fixture
def plan(golden):
    "The layers of our plan."
    return synthesis_layers(32, 5, 512, 32, '-R' in golden[0]['model'])

@pytest.fixture
def generator(golden):
    "Ours, with the official weights; every official tensor is used, as `generator_from_official` refuses what it does not know."
    facts, tensors = golden
    official = {k[2:]: v for k, v in tensors.items() if k.startswith('G.')}
    return generator_from_official(official, make('-R' in facts['model'])).eval().requires_grad_(False)

SAME = {'critically_sampled': 'critical', 'is_torgb': 'to_image', 'in_sampling_rate': 'in_rate', 'out_sampling_rate': 'out_rate', 'tmp_sampling_rate': 'raised_rate', 'up_factor': 'up', 'down_factor': 'down',
        'down_radial': 'radial', 'conv_kernel': 'kernel'}   # official word -> ours, where they differ

def official_row(layer, keys) -> dict:
    "A layer of our plan in the official words."
    shapes = [None, None] if layer.to_image else [list(taps.shape) for taps in layer.filters()]
    made = {'name': f'L{layer.number}_{layer.out_size}_{layer.out_channels}', 'up_filter_shape': shapes[0], 'down_filter_shape': shapes[1], 'padding_xlo_xhi_ylo_yhi': list(layer.padding) * 2,
            'conv_padding': layer.kernel - 1, 'conv_clamp': 256}
    return made | {key: getattr(layer, SAME.get(key, key)) for key in keys if key not in made}

def assert_same_plan(layers, rows):
    first = layers[0]
    assert rows[0] == {'name': 'input', 'channels': first.in_channels, 'size': first.in_size, 'sampling_rate': first.in_rate, 'bandwidth': first.in_cutoff}
    assert len(layers) == len(rows) - 1
    for layer, row in zip(layers, rows[1:]):
        ours = official_row(layer, row)
        assert ours.keys() == row.keys()
        for key, value in row.items(): assert ours[key] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), (row['name'], key)

def test_layer_table(golden, plan): assert_same_plan(plan, golden[0]['layers'])

@pytest.mark.parametrize('configuration', 'tr')
def test_layer_table_at_the_papers_size(shared, configuration):
    rows = json.loads((shared/'goldens'/'param_counts.json').read_text())['stylegan3_layer_tables_256'][configuration]
    assert_same_plan(synthesis_layers(256, 3 if rows[-1]['out_channels'] == 3 else 5, rotation=configuration == 'r'), rows)

@pytest.mark.parametrize('base', [32768, 16384])
@pytest.mark.parametrize('configuration', 'tr')
def test_number_of_weights_at_the_papers_size(shared, configuration, base):
    table = json.loads((shared/'goldens'/'param_counts.json').read_text())['stylegan2/3 (PyTorch, stylegan3 repo)']
    counts = next(v for k, v in table.items() if k.startswith(f'stylegan3-{configuration}_G_cbase{base}'))
    with torch.device('meta'): generator = StyleGAN3Generator(256, channel_base=base, rotation=configuration == 'r')
    parts = {'total': generator.parameters(), 'mapping': generator.mapping.parameters(), 'synthesis': [*generator.input.parameters(), *generator.layers.parameters()]}
    assert {name: sum(p.numel() for p in weights) for name, weights in parts.items()} == {name: counts[name] for name in parts}
    filters = sum(taps.numel() for layer in generator.layers if not layer.plan.to_image for taps in layer.plan.filters())
    assert generator.styles == counts['num_ws'] and sum(b.numel() for b in generator.buffers()) + filters == counts['buffers']

def test_filters(plan, tensors):
    for i, layer in enumerate(plan):
        if layer.to_image: continue
        for ours, theirs in zip(layer.filters(), ('up_filter', 'down_filter')):
            assert torch.allclose(ours, tensors[f'G.synthesis.L{i}_{layer.out_size}_{layer.out_channels}.{theirs}'], atol=1e-6, rtol=0)

def test_styles(generator, tensors):
    assert torch.allclose(generator.mapping(tensors['in.z']), tensors['out.w'], atol=1e-5)
    assert torch.allclose(generator.mapping(tensors['in.z'], 0.7), tensors['out.w_psi0.7'], atol=1e-5)

def outputs(generator, z: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    "The images, and what each layer gave for the first one, under the official names."
    seen = {}
    def keep(name): return lambda module, inputs, output: seen.update({name: output[0, :2].clone()})
    hooks = [generator.input.register_forward_hook(keep('input'))]
    hooks += [layer.register_forward_hook(keep(f'L{i}_{layer.plan.out_size}_{layer.plan.out_channels}')) for i, layer in enumerate(generator.layers)]
    images = generator(z)
    for hook in hooks: hook.remove()
    return images, seen

def test_every_layer_and_the_images(generator, tensors):
    images, seen = outputs(generator, tensors['in.z'])
    assert {f'mid.{name}' for name in seen} == {k for k in tensors if k.startswith('mid.')}
    for name, value in seen.items(): assert torch.allclose(value, tensors[f'mid.{name}'], atol=2e-4, rtol=0), name
    assert torch.allclose(images, tensors['out.img'], atol=2e-4, rtol=0)

def test_truncation(generator, tensors): assert torch.allclose(generator(tensors['in.z'], 0.7), tensors['out.img_psi0.7'], atol=2e-4, rtol=0)

def test_moved_and_turned(golden, generator, tensors):
    degrees = 20 if '-R' in golden[0]['model'] else 0
    assert torch.allclose(transformation(0.1, 0.05, degrees), tensors['in.transform_inverse'], atol=1e-6)
    generator.input.transform.copy_(transformation(0.1, 0.05, degrees))
    images, seen = outputs(generator, tensors['in.z'])
    assert torch.allclose(seen['input'], tensors['mid_transformed.input'], atol=1e-4)
    assert torch.allclose(images, tensors['out.img_transformed'], atol=2e-4, rtol=0)

def test_frequencies_above_the_band_fade(generator, tensors):
    generator.input.transform.copy_(torch.diag(torch.tensor([1.6, 1.6, 1.])))
    assert torch.allclose(generator(tensors['in.z']), tensors['out.img_scaled'], atol=2e-4, rtol=0)

def test_trackers_move_before_they_are_used(generator, tensors):
    generator.train()
    assert torch.allclose(generator(tensors['in.z']), tensors['out.img_ema'], atol=2e-4, rtol=0)
    expected = {k.removeprefix('out.ema.'): v for k, v in tensors.items() if k.startswith('out.ema.')}
    ours = {'mapping.w_avg': generator.mapping.average} | {f'L{i}_{l.plan.out_size}_{l.plan.out_channels}.magnitude_ema': l.magnitude for i, l in enumerate(generator.layers)}
    assert ours.keys() == expected.keys()
    for name, value in ours.items(): assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name

def test_evaluation_changes_nothing(generator, tensors):
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    generator(tensors['in.z'])
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())

def test_blur(tensors):
    sigmas = [float(k.removeprefix('out.img_blur_sigma')) for k in tensors if k.startswith('out.img_blur')]
    for sigma in sigmas: assert torch.allclose(blur(tensors['out.img'], sigma), tensors[f'out.img_blur_sigma{sigma:g}'], atol=1e-5)

def test_blurred_goldens_exist(shared): assert sum(k.startswith('out.img_blur') for k in load_file(shared/'goldens'/'stylegan3r_32.safetensors')) == 2

def test_no_golden_is_left_out(tensors):
    families = ('G.', 'in.', 'mid.', 'out.ema.', 'out.img_blur_sigma')
    single = {'out.w', 'out.w_psi0.7', 'out.img', 'out.img_psi0.7', 'out.img_transformed', 'out.img_scaled', 'out.img_ema', 'mid_transformed.input'}
    assert {k for k in tensors if not k.startswith(families)} == single

def test_tiny_styles_keep_their_image(generator, tensors):
    "Styles are divided by their root mean square over the batch, so that demodulation's epsilon is relative."
    expected = generator(tensors['in.z'])
    for layer in generator.layers[:-1]: layer.affine.weight *= 1e-6; layer.affine.bias *= 1e-6
    assert torch.allclose(generator(tensors['in.z']), expected, atol=2e-4, rtol=0)

def test_bfloat16_is_close(generator, tensors):
    with torch.autocast('cpu', torch.bfloat16): images = generator(tensors['in.z'])
    error = (images - tensors['out.img']).square().mean().sqrt() / tensors['out.img'].square().mean().sqrt()
    assert images.dtype == torch.float32 and 0 < error < 0.05
