"Published generators: files in the official formats give the official images; what would execute, or unfold without end, is refused by its name."
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file

from synthmr.cli import main
from synthmr.generators import denoiser, official
from synthmr.generators.families import load_generator
from synthmr.generators.official import AUTHORS, Found, import_checkpoint
from synthmr.pickles import CheckpointError, Limits
from synthmr.weights import read_checkpoint
from synthmr.slices import CHANNELS, SliceStore

HERE = Path(__file__).parent
ORDER = [AUTHORS.index(c) for c in CHANNELS]
DIFFUSION = {'heads': 4, 'steps': 4000, 'sampler': 'ddim', 'sampling_steps': 4}

@pytest.fixture(scope='session')
def files(tmp_path_factory) -> Path:
    "The goldens' generators as official files, written by another process."
    if not SHARED.is_dir(): pytest.skip(f'{SHARED} is not there')
    out = tmp_path_factory.mktemp('official')
    subprocess.run([sys.executable, HERE/'official_files.py', SHARED/'goldens', out], check=True, cwd=out)
    return out

@pytest.fixture(autouse=True)
def nothing_is_executed(request, tmp_path, monkeypatch):
    "The source code in the files would leave a canary."
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path/'called').exists()
    assert not {'torch_utils', 'dnnlib', 'tfutil'} & set(sys.modules)

def golden(name): return load_file(SHARED/'goldens'/f'{name}.safetensors')
def close(found, expected, tolerance=2e-4): torch.testing.assert_close(found, expected, atol=tolerance * max(1, expected.abs().max().item()), rtol=0)

# Images

GANS = {'stylegan2_32': ('in.z', 'out.img'), 'stylegan3t_32': ('in.z', 'out.img'), 'stylegan3r_32': ('in.z', 'out.img'), 'pggan_32': ('in.latents', 'out.img.lod0'), 'stylegan1_32': ('in.latents', 'out.img.lod0')}
VARIANTS = [*GANS, *(f'stylegan2_32-protocol{p}' for p in (2, 3, 5)), *(f'{name}-protocol{p}' for name in ('pggan_32', 'stylegan1_32') for p in (2, 5))]

@torch.no_grad()
@pytest.mark.parametrize('name', VARIANTS)
def test_a_gan_paints_the_golden_images(files, tmp_path, name):
    latents, images = GANS[name.partition('-')[0]]
    tensors = golden(name.partition('-')[0])
    import_checkpoint(files/f'{name}.pkl', tmp_path/'same', channels=CHANNELS)
    close(load_generator(tmp_path/'same').sample(tensors[latents]), tensors[images])
    import_checkpoint(files/f'{name}.pkl', tmp_path/'ours')
    close(load_generator(tmp_path/'ours').sample(tensors[latents]), tensors[images][:, ORDER])

@torch.no_grad()
@pytest.mark.parametrize('name', ['pggan_32', 'stylegan1_32'])
def test_a_network_that_was_still_growing(files, tmp_path, name):
    tensors = golden(name)
    import_checkpoint(files/f'{name}-lod1.75.pkl', tmp_path/'growing', channels=CHANNELS)
    close(load_generator(tmp_path/'growing').sample(tensors['in.latents']), tensors['out.img.lod1.75'])
    assert any('lod 1.75' in note for note in json.loads((tmp_path/'growing'/'config.json').read_text())['published']['notes'])

@torch.no_grad()
@pytest.mark.parametrize('key, images', [('truncation', 'out.img_psi0.7'), ('truncation', 'out.img_psi0.7_cutoff8.lod0')])
def test_truncation(files, tmp_path, key, images):
    name = 'stylegan1_32' if 'cutoff' in images else 'stylegan2_32'
    import_checkpoint(files/f'{name}.pkl', tmp_path/'g', channels=CHANNELS, given={key: 0.7})
    close(load_generator(tmp_path/'g').sample(golden(name)[GANS[name][0]]), golden(name)[images])

@torch.no_grad()
@pytest.mark.parametrize('variance', ['fixed', 'learned'])
@pytest.mark.parametrize('format', ['', '-legacy'])
def test_a_diffusion_model_predicts_the_golden_noise(files, tmp_path, variance, format):
    tensors = golden(f'guided_unet64_{variance}')
    kept = import_checkpoint(files/f'guided_unet64_{variance}{format}.pt', tmp_path/'same', channels=CHANNELS, resolution=64, given=DIFFUSION)
    assert (kept.generator.attention, kept.generator.multipliers, kept.generator.learned_variance) == ((16, 8), (1, 1, 2, 2), variance == 'learned')
    close(load_generator(tmp_path/'same').network(tensors['in.x'], tensors['in.t']), tensors['out.model'], 1e-4)
    import_checkpoint(files/f'guided_unet64_{variance}{format}.pt', tmp_path/'ours', resolution=64, given=DIFFUSION)
    read, both = load_generator(tmp_path/'ours'), ORDER + [5 + i for i in ORDER] * (variance == 'learned')
    close(read.network(tensors['in.x'][:, ORDER], tensors['in.t']), tensors['out.model'][:, both], 1e-4)
    for i, t in enumerate(tensors['in.t'].tolist()):
        sigma = float(read.levels[t])
        found = read.denoise(tensors['in.x'][i:i + 1, ORDER] * (1 + sigma**2)**0.5, sigma)
        torch.testing.assert_close(found, tensors['out.pred_xstart'][i:i + 1, ORDER], atol=2e-4 + 1e-5 * sigma, rtol=0)

def test_the_transposed_convolutions_of_stylegan1_are_told_by_its_arguments(files):
    found = official.recognise(files/'stylegan1_32.pkl', read_checkpoint(files/'stylegan1_32.pkl')[0])
    def made(**facts): return official.fill_generator(official.build_generator(kept.generator, 32, 0), Found(found.path, found.kind, '', found.tensors, {**found.facts, **facts})).averaged.synthesis.ups[0].weight
    kept = official.describe(found, {}, None)
    assert torch.equal(made(fused_scale=True), made().flip(2, 3)) and torch.equal(made(fused_scale=False), made(fused_scale='auto'))

def test_kinds_and_shapes_are_told_by_the_files(files):
    def described(file, **kw):
        kept = official.describe(official.recognise(files/file, read_checkpoint(files/file)[0]), kw, None)
        return kept.resolution, {k: v for k, v in kept.generator if k in ('kind', 'latents', 'width', 'mapping_layers', 'channel_base', 'channel_max', 'rotation', 'layers', 'margin')}
    assert described('stylegan2_32.pkl') == (32, {'kind': 'stylegan2', 'latents': 64, 'width': 64, 'mapping_layers': 8, 'channel_base': 512, 'channel_max': 32})
    for letter in 'tr': assert described(f'stylegan3{letter}_32.pkl') == (32, {'kind': 'stylegan3', 'latents': 64, 'width': 64, 'mapping_layers': 2, 'channel_base': 512, 'channel_max': 32, 'rotation': letter == 'r', 'layers': 14, 'margin': 10})
    assert described('pggan_32.pkl') == (32, {'kind': 'progressive_gan', 'latents': 16, 'channel_base': 128, 'channel_max': 16})
    assert described('stylegan1_32.pkl') == (32, {'kind': 'stylegan1', 'latents': 16, 'width': 16, 'mapping_layers': 8, 'channel_base': 128, 'channel_max': 16})

# Our own networks at the paper's size are told by names and shapes alone

@pytest.mark.parametrize('kind', ['progressive_gan', 'stylegan1', 'stylegan2', 'stylegan3', 'stylegan3r', 'diffusion'])
def test_the_papers_networks_are_recognised(kind):
    from synthmr.generators import stylegan2, stylegan3
    from synthmr.generators.families import FAMILIES
    params = FAMILIES[kind.removesuffix('r')][0](**({'rotation': True} if kind.endswith('r') else {}))
    with torch.device('meta'): network = FAMILIES[params.kind][1](params, 256).averaged
    own = network.state_dict()
    if kind == 'diffusion': names = denoiser.official_names(network)
    elif kind == 'stylegan2': names = stylegan2.official_names(network)
    elif 'stylegan3' in kind: names = stylegan3._our_names(network)
    else:
        place = 'G_synthesis/' if kind == 'stylegan1' else ''      # what is looked at, in TensorFlow's shapes
        widths = {4 << k: layer.weight.shape[0] for k, layer in enumerate((network.synthesis if place else network).convs)}
        names = {f'{place}{r}x{r}/Conv1/bias': (w,) for r, w in widths.items() if r > 4} | {f'{place}ToRGB_lod0/bias': (5,)}
        names |= {f'{place}4x4/Const/bias': (512,), **{f'G_mapping/Dense{i}/{part}': (512, 512)[:1 + (part == 'weight')] for i in range(8) for part in ('weight', 'bias')}} if place else {'4x4/Dense/weight': (512, 8192), '4x4/Dense/bias': (512,)}
    shapes = {official_name: tuple(own[ours].shape) if isinstance(ours, str) else ours for official_name, ours in names.items()}
    found = Found(Path('network.pkl'), params.kind, '', {name: type('Plan', (), {'shape': shape}) for name, shape in shapes.items()})
    kept = official.describe(found, {}, None)
    assert kept.resolution == 256 and kept.generator == params

# Folder, record, command line

def test_import_then_sample_on_the_command_line(files, tmp_path, capsys):
    assert main(['import-checkpoint', str(files/'stylegan2_32.pkl'), str(tmp_path/'g')]) == 0
    record = json.loads((tmp_path/'g'/'config.json').read_text())
    assert record['published'].keys() == {'file', 'sha256', 'bytes', 'format', 'family', 'channels', 'notes', 'date'} and record['published']['file'] == 'stylegan2_32.pkl' and record['provenance']['versions']
    assert sorted(p.name for p in (tmp_path/'g').iterdir()) == ['config.json', 'weights.safetensors']
    for store, batch in (('a', 4), ('b', 3)): assert main(['sample', str(tmp_path/'g'), str(tmp_path/store), '--n', '5', '--seed', '7', '--batch-size', str(batch), '--device', 'cpu']) == 0
    a, b = SliceStore.open(tmp_path/'a'), SliceStore.open(tmp_path/'b')
    assert (a[:] == b[:]).all() and a.meta['published'] == record['published'] and a.meta['weights'] == record['weights'] and list(a.slices) == ['seed', 'number', 'split', 'tumour']
    assert main(['sample', str(tmp_path/'g'), str(tmp_path/'a'), '--n', '5', '--seed', '8']) == 1
    assert main(['import-checkpoint', str(files/'stylegan2_32.pkl'), str(tmp_path/'g')]) == 1
    assert 'exists already' in capsys.readouterr().err

def test_parameters_that_the_file_does_not_say(files, tmp_path, capsys):
    (tmp_path/'p.yaml').write_text('heads: 4\nsampler: ddim\nsampling_steps: 2\nchunk: 2\n')
    file = str(files/'guided_unet64_fixed.pt')
    assert main(['import-checkpoint', file, str(tmp_path/'g'), '--resolution', '64', '--params', str(tmp_path/'p.yaml'), '--channels', ','.join(CHANNELS)]) == 0
    assert main(['sample', str(tmp_path/'g'), str(tmp_path/'s'), '--n', '2']) == 0
    for text, code, words in (('channels: 64', 1, 'channels: it is 32 in this file, not 64'), ('head: 4', 2, "head: unknown key; did you mean 'heads'?"), ('kind: stylegan2', 2, 'kind')):
        (tmp_path/'p.yaml').write_text(text); capsys.readouterr()
        assert main(['import-checkpoint', file, str(tmp_path/'other'), '--params', str(tmp_path/'p.yaml')]) == code
        said = capsys.readouterr().err
        assert words in said and file in said and len(said.splitlines()) == 1
    assert main(['import-checkpoint', file, str(tmp_path/'other'), '--channels', 'T1w,T2w']) == 1
    assert not (tmp_path/'other').exists()

def test_a_study_takes_an_imported_generator_like_any_other(files, tmp_path, monkeypatch):
    from tiny import DATA
    from synthmr.params import check, load, save
    from synthmr.studies.runs import GeneratorRun, make_data, make_generator
    monkeypatch.setenv('SYNTHMR_HOME', str(tmp_path/'home'))
    import_checkpoint(files/'pggan_32.pkl', tmp_path/'g')
    given = {'data': {**DATA, 'resolution': 32}, 'images': 3, 'generator': {'kind': 'imported', 'folder': str(tmp_path/'g')}}
    run = check(GeneratorRun, given)
    assert run.label == 'progressive_gan' and load(GeneratorRun, save(run, tmp_path/'run.yaml')) == run and run.asks.hours > 0
    make_data(run.data)
    generator, samples = make_generator(run)
    assert len(samples) == 3 and torch.equal(generator.generate(0, [2]), load_generator(tmp_path/'g').generate(0, [2]))
    (tmp_path/'g').rename(tmp_path/'elsewhere')
    moved = check(GeneratorRun, {**given, 'generator': {**given['generator'], 'folder': str(tmp_path/'elsewhere')}})
    assert moved.name == run.name                  # named by the weights, not by the place
    with pytest.raises(RuntimeError, match='paints 32 pixels, the slices have 16'):
        other = check(GeneratorRun, {**given, 'data': DATA, 'generator': moved.generator}); make_data(other.data); make_generator(other)

def test_a_trained_run_is_sampled_from_its_folder(tmp_path, monkeypatch):
    import yaml
    from tiny import generator as tiny_run
    from synthmr.params import load
    from synthmr.studies.runs import GeneratorRun, make_generator
    monkeypatch.setenv('SYNTHMR_HOME', str(tmp_path/'home'))
    (tmp_path/'run.yaml').write_text(yaml.safe_dump(tiny_run('progressive_gan', images=5)))
    assert main(['train', str(tmp_path/'run.yaml')]) == 0
    run = load(GeneratorRun, tmp_path/'run.yaml')
    assert main(['sample', str(run.folder), str(tmp_path/'s'), '--n', '5', '--device', 'cpu']) == 0
    store, real = SliceStore.open(tmp_path/'s'), SliceStore.open(run.data.folder)
    assert store.meta['simulated'] is True and store.meta['spacing'] == real.meta['spacing'] and 'published' not in store.meta
    assert (store[:] == make_generator(run)[1][:]).all()       # as the run samples it
    with pytest.raises(ValueError, match='was not imported but trained'): load(GeneratorRun, tmp_path/'run.yaml', generator={'kind': 'imported', 'folder': str(run.folder)})

# What does not fit

@pytest.fixture
def content(files):
    "A way to change the tensors of a file before they are fitted."
    def changed(name, change):
        found = official.recognise(files/name, read_checkpoint(files/name)[0])
        change(found.tensors)
        return found
    return changed

@pytest.mark.parametrize('file, key, kw', [('stylegan2_32.pkl', 'synthesis.b16.conv0.affine.weight', {}), ('stylegan3t_32.pkl', 'synthesis.L3_36_32.affine.weight', {}), ('pggan_32.pkl', '16x16/Conv0_up/weight', {}),
                                           ('stylegan1_32.pkl', 'G_synthesis/8x8/Conv1/StyleMod/weight', {}), ('guided_unet64_fixed.pt', 'middle_block.1.qkv.weight', {'resolution': 64})])
def test_weights_that_do_not_fit_are_named_with_their_shapes(content, file, key, kw):
    def fit(change):
        found = content(file, change)
        kept = official.describe(found, DIFFUSION if kw else {}, kw.get('resolution'))
        official._build(found, kept, CHANNELS)
    shape = content(file, lambda t: None).tensors[key].shape
    with pytest.raises(ValueError, match=key.replace('.', r'\.') + ': .*missing'): fit(lambda t: t.pop(key))
    with pytest.raises(ValueError, match='extra: n.*(shape is \\(|weight)'): fit(lambda t: t.update(extra=t[key]))
    class Short:
        nbytes = 4; shape = (1, *content(file, lambda t: None).tensors[key].shape[1:])
        def tensor(self): return torch.ones(self.shape)
    short = Short()
    with pytest.raises(ValueError, match=r'{}: shape \({}.*\({}'.format(key.replace('.', r'\.'), ', '.join(map(str, short.shape)), '' if '/' in key else ', '.join(map(str, shape)))): fit(lambda t: t.update({key: short}))

def test_what_the_network_does_otherwise_is_an_error(files):
    def described(file, **facts):
        found = official.recognise(files/file, read_checkpoint(files/file)[0])
        return official.describe(Found(found.path, found.kind, '', found.tensors, {**found.facts, **facts}), {}, None)
    for file, facts, words in (('stylegan1_32.pkl', {'blur_filter': [1, 3, 3, 1]}, 'blur_filter'), ('stylegan1_32.pkl', {'label_size': 3}, 'label_size: 3'), ('pggan_32.pkl', {'use_pixelnorm': False}, 'use_pixelnorm: False'),
                               ('stylegan3t_32.pkl', {'synthesis.output_scale': 0.5}, 'output_scale: 0.5'), ('stylegan2_32.pkl', {'synthesis.b8.architecture': 'resnet'}, 'architecture: resnet'), ('stylegan2_32.pkl', {'mapping.fc3.bias_gain': 1.}, 'bias_gain: 1.0')):
        with pytest.raises(CheckpointError, match=words): described(file, **facts)

def test_another_filter_is_an_error(content):
    for file, key in (('stylegan2_32.pkl', 'synthesis.b8.conv0.resample_filter'), ('stylegan3t_32.pkl', 'synthesis.L3_36_32.up_filter')):
        found = content(file, lambda t: None)
        class Other: shape, nbytes, tensor = found.tensors[key].shape, 64, lambda self: torch.ones(self.shape)
        found.tensors[key] = Other()
        with pytest.raises(ValueError, match=key.replace('.', r'\.') + ': differs from the filter'): official.fill_generator(official.build_generator(official.describe(found, {}, None).generator, 32, 0), found)

@pytest.mark.parametrize('thing, words', [(b'', 'damaged'), (b'no pickle', 'damaged'), (b'\x80\x04N.', 'holds none of the generators'), (b'\x80\x04}.', 'holds none of the generators'), (b'\x80\x04)\x85.', 'holds none of')])
def test_files_that_are_something_else(tmp_path, thing, words):
    (tmp_path/'model.pkl').write_bytes(thing)
    with pytest.raises(CheckpointError, match=f'model.pkl: .*{words}'): import_checkpoint(tmp_path/'model.pkl', tmp_path/'g')
    with pytest.raises(CheckpointError, match='nowhere.pkl: cannot be read'): import_checkpoint(tmp_path/'nowhere.pkl', tmp_path/'g')

# What is refused

@pytest.fixture(scope='module')
def refused(tmp_path_factory) -> dict:
    "What became of each hostile file, in a process with little memory that notes all that is executed."
    out = tmp_path_factory.mktemp('hostile')
    done = subprocess.run([sys.executable, HERE/'hostile_files.py', out], capture_output=True, text=True, timeout=600, cwd=out)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])

def test_hostile_files_are_refused_by_name(refused):
    wrong = {name: (r['words'], r['said']) for name, r in refused['files'].items() if not (r['said'].startswith(r['file'] + ': ') and r['words'] in r['said'] and '\n' not in r['said'] and len(r['said']) < 400)}
    assert wrong == {} and len(refused['files']) > 50

def test_hostile_files_execute_nothing(refused):
    assert refused['events'] == [] and refused['canary'] is False
    assert refused['would_have'] > 5                # with Python's own unpickler they do

def test_hostile_files_take_little_time_and_memory(refused):
    print(max((r['seconds'], name) for name, r in refused['files'].items()), refused['megabytes'])
    assert max(r['seconds'] for r in refused['files'].values()) < 30 and refused['megabytes'] < 800

def test_a_model_that_unfolds_is_refused(files, tmp_path):
    "Many weights that share one storage: every one is within its bounds, all of them are not."
    content, data = read_checkpoint(files/'stylegan2_32.pkl')
    found = official.recognise(files/'stylegan2_32.pkl', content)
    big = max(found.tensors.values(), key=lambda t: t.nbytes)
    found.tensors |= {f'extra{i}': big for i in range(200)}
    with pytest.raises(CheckpointError, match='refused: .* bytes of tensors'): official._build(found, official.describe(found, {}, None), CHANNELS)

def test_limits_are_told(files):
    for limits, words in ((Limits(opcodes=100), 'more than 100 opcodes'), (Limits(size=1000), 'at most 1,000')):
        with pytest.raises(CheckpointError, match=words): read_checkpoint(files/'pggan_32.pkl', limits)
    with pytest.raises(CheckpointError, match='more than 20 tensors'): list(official.walk(Path('x.pkl'), read_checkpoint(files/'stylegan2_32.pkl')[0]['G_ema'], Limits(tensors=20)))
    with pytest.raises(CheckpointError, match='archive of'): read_checkpoint(files/'guided_unet64_fixed.pt', Limits(members=3))

def test_an_archive_is_read_where_it_lies(files, tmp_path):
    "Nothing of a zip archive is ever written."
    before = set(tmp_path.rglob('*'))
    with zipfile.ZipFile(files/'guided_unet64_fixed.pt') as z: assert all(i.compress_type == 0 for i in z.infolist())
    read_checkpoint(files/'guided_unet64_fixed.pt')
    assert set(tmp_path.rglob('*')) == before
