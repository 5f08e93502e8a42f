"""Whatever a file holds: a clear error that names it, or an answer; never another traceback, a hang, or more memory than the file is worth.

Every reader of files that somebody else may have written is given real files with flipped bits, other bytes and missing ends (Hypothesis draws them; the same ones in every run), and files made to do harm.
"""
import gzip
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import SHARED
from damage import absurd, ABSURD, answers, damage, little_memory, many  # noqa: F401 little_memory is a fixture
from hypothesis import given
from hypothesis import strategies as st

from synthmr.cli import main
from synthmr.data.nifti import InputError, Subject, find_subjects, read_header, read_volume
from synthmr.data.prepare import PrepareParams, prepare, prepare_subject, read_split
from synthmr.data.simulated import SimulatedParams, simulate_cohort
from synthmr.generators import official
from synthmr.generators.families import FAMILIES, build_generator, load_generator
from synthmr.generators.official import import_checkpoint
from synthmr.metrics.features import read_state
from synthmr.params import ParamsError, load, resolved
from synthmr.pickles import Attributes, Instance, Name
from synthmr.segmenters.training import FAMILIES as SEGMENTERS
from synthmr.segmenters.training import build_segmenter, load_segmenter
from synthmr.slices import SliceStore
from synthmr.studies.reader_scores import read_answers, simulated_reader
from synthmr.studies.reader_study import FORMAT
from synthmr.studies.reproduce import code_of, the_row
from synthmr.studies.runs import DataRun, GeneratorRun
from synthmr.studies.study import Study
from synthmr.weights import _IN_PICKLES, Array, Dtype, Storage, View, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = {'stylegan2': {'latents': 8, 'width': 8, 'mapping_layers': 1, 'channel_base': 64, 'channel_max': 8}, 'stylegan3': {'latents': 8, 'width': 8, 'mapping_layers': 1, 'channel_base': 64, 'channel_max': 8, 'layers': 4, 'margin': 2},
        'progressive_gan': {'latents': 8, 'channel_base': 64, 'channel_max': 8}, 'diffusion': {'channels': 8, 'multipliers': [1], 'blocks': 1, 'attention': [], 'steps': 100, 'sampling_steps': 3}}

# Files to begin with, made once; those of patients and goldens where they are

@pytest.fixture(scope='module')
def good(tmp_path_factory) -> Path:
    "A folder of whole files of every kind that is read."
    folder = tmp_path_factory.mktemp('good')
    simulate_cohort(folder/'cohort', SimulatedParams(subjects=2, seed=1, spacing=5, workers=0), progress=False)
    prepare(PrepareParams(nifti=str(folder/'cohort'), resolution=16, test_share=0.5, workers=0), folder/'store', progress=False)
    for kind, values in TINY.items():
        params = FAMILIES[kind][0](**values)
        (folder/kind).mkdir()
        (folder/kind/'config.json').write_text(json.dumps({'generator': resolved(params), 'resolution': 16}))
        safetensors.torch.save_file(build_generator(params, 16, 0).averaged.state_dict(), folder/kind/'weights.safetensors')
    for kind, values in (('unet', {'levels': 3, 'filters': 4}), ('swin', {'channels': 8, 'depths': [1, 1, 1], 'heads': [1, 1, 1], 'window': 2, 'head_channels': 8, 'auxiliary_channels': 8})):
        params = SEGMENTERS[kind][0](**values)
        (folder/kind).mkdir()
        (folder/kind/'config.json').write_text(json.dumps({'segmenter': resolved(params), 'augmentation': False}))
        safetensors.torch.save_file(build_segmenter(params, False).state_dict(), folder/kind/'weights.safetensors')
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict()
    torch.save(state, folder/'zip.pth'); torch.save(state, folder/'old.pth', _use_new_zipfile_serialization=False); safetensors.torch.save_file(state, folder/'state.safetensors')
    (folder/'arrays.pkl').write_bytes(pickle.dumps({'a': [np.arange(6.).reshape(2, 3), np.float32(2)], 'b': ('text', {1, 2})}))
    (folder/'split.csv').write_text('subject,split\nSIM_001,train\nSIM_002,test\n')
    (folder/'row.csv').write_text('run,commit,dice\nrow,0123abcd,0.5\n'); (folder/'row.yaml').write_text('')
    if SHARED.is_dir(): subprocess.run([sys.executable, ROOT/'tests'/'official_files.py', SHARED/'goldens', folder], check=True)
    return folder

def volumes(good: Path) -> list[Path]: return sorted((good/'cohort').rglob('*.nii.gz'))

# Volumes

@many(150)
@given(st.integers(0, 1 << 20), damage(), st.sampled_from(['plain', 'packed', 'stream']))
def test_damaged_volumes(good, tmp_path_factory, which, change, how):
    path = volumes(good)[which % len(volumes(good))]
    file = tmp_path_factory.mktemp('v')/('x.nii' if how == 'plain' else 'x.nii.gz')
    file.write_bytes(change(path.read_bytes()) if how == 'stream' else (bytes if how == 'plain' else lambda b: gzip.compress(b, 1))(change(gzip.decompress(path.read_bytes()))))
    answers(lambda: read_header(file), file)
    answers(lambda: read_volume(file), file)

@many(60)
@given(st.integers(0, 4), damage())
def test_damaged_volumes_of_a_subject(good, tmp_path_factory, which, change):
    subject = next(iter(find_subjects(good/'cohort').values()))
    channel = list(subject.files)[which]
    file = tmp_path_factory.mktemp('s')/'x.nii.gz'
    file.write_bytes(gzip.compress(change(gzip.decompress(subject.files[channel].read_bytes())), 1))
    answers(lambda: prepare_subject(Subject('x', {**subject.files, channel: file}, subject.enhancing_label), 16), *subject.files.values(), file)

@many(25)
@given(st.integers(0, 1 << 20), damage())
def test_damaged_volumes_of_real_patients(tmp_path_factory, which, change):
    if not SHARED.is_dir(): pytest.skip(f'{SHARED} is not there')
    real = sorted((SHARED/'real').rglob('*.nii.gz'))
    file = tmp_path_factory.mktemp('r')/'x.nii.gz'
    file.write_bytes(change(real[which % len(real)].read_bytes()))
    answers(lambda: read_volume(file), file)

def header(**fields) -> bytes:
    "A NIfTI-1 header of 2x2x2 bytes, with other values here and there."
    import nibabel as nib
    h = nib.Nifti1Header(); h.set_data_shape((2, 2, 2)); h.set_data_dtype(np.uint8); h['magic'], h['vox_offset'] = b'n+1', 352
    for key, value in fields.items(): h[key] = value
    return h.binaryblock + bytes(4)

@pytest.mark.parametrize('content, words', [
    (header(dim=[3, 1024, 1024, 256, 1, 1, 1, 1], datatype=64), 'truncated'),                               # claims 2 GB
    (gzip.compress(header(dim=[3, 1024, 1024, 256, 1, 1, 1, 1], datatype=64)), 'truncated'),
    (header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), 'absurd header'), (header(dim=[3, -1, 2, 2, 1, 1, 1, 1]), 'absurd header'), (header(dim=[0, 2, 2, 2, 1, 1, 1, 1]), '0 axes'), (header(dim=[-3, 2, 2, 2, 1, 1, 1, 1]), 'axes'),
    (header(vox_offset=np.nan), 'start at byte'), (header(vox_offset=1e30), 'start at byte'), (header(datatype=2304), 'unsupported data type'), (header(scl_slope=np.inf), 'slope inf'), (header(pixdim=[1, 0, 1, 1, 1, 1, 1, 1]), 'voxels of'),
    (gzip.compress(header() + bytes(8) + bytes(500_000_000)), 'holds more'), (gzip.compress(gzip.compress(bytes(10))), 'not a NIfTI file'), (b'\x1f\x8b' + bytes(100), 'gzip')], ids=lambda v: v if isinstance(v, str) else f'{len(v)} bytes')
def test_headers_that_lie(tmp_path, content, words):
    file = tmp_path/'lie.nii.gz'
    file.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=words) as e: read_volume(file)
    assert str(file) in str(e.value) and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000   # KB: nothing is unfolded that the header does not claim

@pytest.mark.parametrize('scale', [1 << 52, 1670305666322702])
def test_intensities_of_63_bits(tmp_path, scale):
    import nibabel as nib
    for channel, volume in (('t1', np.arange(16 * 16 * 3, dtype=np.int64).reshape(16, 16, 3) * scale), *((c, np.ones((16, 16, 3), np.int64)) for c in ('t1ce', 't2', 'flair')), ('seg', np.zeros((16, 16, 3), np.uint8))):
        nib.Nifti1Image(volume, np.eye(4), dtype=volume.dtype).to_filename(tmp_path/f'a_{channel}.nii')
    assert len(prepare_subject(find_subjects(tmp_path)['a'], 16)[0]) == 3

# Stores

def use_store(path: Path):
    store = SliceStore.open(path)
    _ = store[:], store.subjects, store.where(split='train'), store.examples(3), store.largest_tumours(), store.fingerprint, repr(store)

@many(150)
@given(st.sampled_from(['meta.json', 'slices.csv', 'images.npy']), damage(), st.one_of(st.none(), absurd()))
def test_damaged_stores(good, tmp_path_factory, name, change, other):
    path = tmp_path_factory.mktemp('stores')/'store'
    shutil.copytree(good/'store', path)
    (path/name).write_bytes((other if other and name == 'meta.json' else change)((path/name).read_bytes()))
    answers(lambda: use_store(path), path)

def npy(descr: str, shape, fortran=False) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    return b'\x93NUMPY\x01\x00' + (118).to_bytes(2, 'little') + text + b' ' * (117 - len(text)) + b'\n' + bytes(1000)

@pytest.mark.parametrize('content, words', [(npy('|O', (2, 5, 16, 16)), 'images.npy is damaged'), (npy('|u1', (10**12, 5, 16, 16)), 'its header says'), (npy('|u1', (10**15, 0, 16, 16)), 'damaged'), (npy('|u1', (-1, 5, 16, 16)), 'damaged'),
    (npy('|u1', (2, 5, 16, 16), True), 'order of Fortran'), (npy('<f8', (1, 5, 4, 4)), 'holds float64'), (b'\x93NUMPY\x01\x00\x40\x00' + b'(' * 64, 'damaged'), (b'\x93NUMPY\x03\x00' + bytes(90), 'npy format'), (pickle.dumps([1]), 'damaged'), (b'', 'damaged')])
def test_images_that_lie(good, tmp_path, content, words):
    shutil.copytree(good/'store', tmp_path/'store')
    (tmp_path/'store'/'images.npy').write_bytes(content)
    with pytest.raises(RuntimeError, match=words) as e: use_store(tmp_path/'store')
    assert str(tmp_path/'store') in str(e.value)

@pytest.mark.parametrize('name, content', [('meta.json', b'[' * 200_000), ('meta.json', b'{"format": "synthmr slice store 1", "channels": 5, "resolution": "16"}'), ('meta.json', b'[]'), ('slices.csv', b''), ('slices.csv', b'\xff\xfe'),
                                           ('slices.csv', b'subject,z,split\nx,1,train\n'), ('slices.csv', b'subject,z,split,tumour\nx,1,train,many\n'), ('slices.csv', b'a,b\n1,2,3\n')])
def test_tables_and_descriptions_that_are_none(good, tmp_path, name, content):
    shutil.copytree(good/'store', tmp_path/'store')
    (tmp_path/'store'/name).write_bytes(content)
    with pytest.raises(RuntimeError, match=str(tmp_path/'store')): use_store(tmp_path/'store')

# Weights and their configurations

@many(120)
@given(st.sampled_from(list(TINY)), st.booleans(), damage(), absurd())
def test_damaged_generators(good, tmp_path_factory, kind, weights, change, other):
    path = tmp_path_factory.mktemp('generators')/kind
    shutil.copytree(good/kind, path)
    file = path/('weights.safetensors' if weights else 'config.json')
    file.write_bytes((change if weights else other)(file.read_bytes()))
    answers(lambda: load_generator(path), path)

@many(80)
@given(st.sampled_from(['unet', 'swin']), st.booleans(), damage(), absurd())
def test_damaged_segmenters(good, tmp_path_factory, kind, weights, change, other):
    path = tmp_path_factory.mktemp('segmenters')/kind
    shutil.copytree(good/kind, path)
    file = path/('weights.safetensors' if weights else 'config.json')
    file.write_bytes((change if weights else other)(file.read_bytes()))
    answers(lambda: load_segmenter(path), path)

@pytest.mark.parametrize('changed, words', [({'channel_base': 1 << 20, 'channel_max': 1 << 20}, 'is smaller than the model'), ({'mapping_layers': 10**9}, 'mapping_layers: 1000000000 is absurd'), ({'latents': 10**12}, 'latents')])
def test_configurations_that_describe_a_giant(good, tmp_path, changed, words):
    shutil.copytree(good/'stylegan2', tmp_path/'g')
    config = json.loads((tmp_path/'g'/'config.json').read_text())
    config['generator'] |= changed
    (tmp_path/'g'/'config.json').write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ParamsError), match=words): load_generator(tmp_path/'g')

@many(120)
@given(st.sampled_from(['zip.pth', 'old.pth', 'state.safetensors']), damage())
def test_damaged_weights_of_feature_networks(good, tmp_path_factory, name, change):
    file = tmp_path_factory.mktemp('features')/name
    file.write_bytes(change((good/name).read_bytes()))
    answers(lambda: read_state(file), file)

def test_a_pickled_network_is_no_file_of_weights(good, tmp_path):
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path/'net.pth')
    with pytest.raises(RuntimeError, match='net.pth: refused: torch.nn.modules.conv.Conv2d'): read_state(tmp_path/'net.pth')

# Published models

OFFICIAL = ['stylegan2_32.pkl', 'stylegan3r_32.pkl', 'pggan_32.pkl', 'stylegan1_32.pkl', 'guided_unet64_fixed.pt', 'guided_unet64_fixed-legacy.pt']

@many(60)
@given(st.sampled_from(OFFICIAL), damage())
def test_damaged_published_models(good, tmp_path_factory, name, change):
    if not (good/name).is_file(): pytest.skip(f'{SHARED} is not there')
    folder = tmp_path_factory.mktemp('published')
    (folder/name).write_bytes(change((good/name).read_bytes()))
    answers(lambda: import_checkpoint(folder/name, folder/'made', resolution=64 if name.endswith('.pt') else None), folder)

def inside(thing, places=None) -> list:
    "All places in what was read, as a function that puts something else there."
    places = [] if places is None else places
    def put(container, key): return lambda value: container.__setitem__(key, value)
    if isinstance(thing, dict|list):
        for key in thing if isinstance(thing, dict) else range(len(thing)): places.append(put(thing, key)); inside(thing[key], places)
    elif isinstance(thing, tuple):
        for part in thing: inside(part, places)
    elif isinstance(thing, Instance): places += [lambda value: setattr(thing, 'state', value), lambda value: setattr(thing, 'of', str(value))]; inside(thing.state, places)
    elif isinstance(thing, View): places += [lambda value: setattr(thing, 'shape', value) if isinstance(value, tuple) else None] * 2
    return places

ODD = st.one_of(ABSURD, st.sampled_from([(1 << 20, 1 << 20), (), (0,), (5,), (1, 1, 1, 1), Instance('x', {}), Array(), Name('torch.FloatStorage'), b'bytes', {'_modules': 1}, View(Storage(torch.float32, 1, lambda: memoryview(bytes(4))), 0, (), ())]))

@many(150)
@given(st.sampled_from(OFFICIAL), st.lists(st.tuples(st.integers(0, 1 << 30), ODD), min_size=1, max_size=3))
def test_published_models_that_hold_something_else(good, tmp_path_factory, name, changes):
    "One value of a published model is of another kind: a layer's name, a shape, an attribute, a module."
    if not (good/name).is_file(): pytest.skip(f'{SHARED} is not there')
    folder, (content, data) = tmp_path_factory.mktemp('other'), read_checkpoint(good/name)
    places = inside(content)
    for where, value in changes: places[where % len(places)](value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, 'read_checkpoint', lambda path, limits: (content, data))
        answers(lambda: import_checkpoint(good/name, folder/'made', resolution=64 if name.endswith('.pt') else None), good/name)

@many(200)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_as_a_pickle(tmp_path_factory, content, framed):
    file = tmp_path_factory.mktemp('bytes')/'x.pkl'
    file.write_bytes(b'\x80\x04' * framed + content + b'.')
    answers(lambda: import_checkpoint(file, file.with_name('made')), file)

KNOWN = sorted(_IN_PICKLES)
PIECES = st.one_of(st.sampled_from([b']', b'}', b')', b'N', b'(', b'a', b'e', b's', b'u', b't', b'd', b'l', b'R', b'b', b'\x81', b'2', b'0', b'1', b'\x85', b'\x86', b'\x87', b'\x94', b'h\x00', b'h\x01', b'K\x05', b'J\xff\xff\xff\x7f', b'\x8a\x00', b'\x88',
                                    b'\x8f', b'\x90', b'\x91', b'Q', b'\x93', b'C\x02ab', b'\x8c\x02f4', b'\x8c\x01<', b'\x8c\x06latin1']),
                   st.sampled_from(KNOWN).map(lambda name: b'c' + name.rpartition('.')[0].encode() + b'\n' + name.rpartition('.')[2].encode() + b'\n'))

@many(400)
@given(st.lists(PIECES, max_size=40))
def test_programs_of_known_words(tmp_path_factory, pieces):
    "Opcodes and allowed names in any order: what is built is plain, or one line says why not."
    file = tmp_path_factory.mktemp('programs')/'x.pkl'
    file.write_bytes(b'\x80\x04' + b''.join(pieces) + b'.')
    def use():
        value, _ = read_checkpoint(file)
        assert type(value) in (type(None), bool, int, float, str, bytes, list, tuple, dict, set, frozenset, Name, Attributes, Instance, Array, Dtype, View, Storage)
    answers(use, file)

@many(100)
@given(damage())
def test_damaged_pickles(good, tmp_path_factory, change):
    file = tmp_path_factory.mktemp('pickles')/'x.pkl'
    file.write_bytes(change((good/'arrays.pkl').read_bytes()))
    answers(lambda: import_checkpoint(file, file.with_name('made')), file)

# Parameters and tables

@many(150)
@given(st.sampled_from(['demo/diffusion', 'demo/stylegan3', 'small/study', 'brats2020/data']), damage())
def test_damaged_parameters(tmp_path_factory, name, change):
    file = tmp_path_factory.mktemp('params')/'p.yaml'
    file.write_bytes(change((ROOT/'params'/f'{name}.yaml').read_bytes()))
    here = os.getcwd(); os.chdir(ROOT)      # parameters name other files
    try: answers(lambda: load({'study': Study, 'data': DataRun}.get(name.split('/')[1], GeneratorRun), file), file)
    finally: os.chdir(here)

def laughs(n: int, merged: bool=False) -> str:
    "Nine times nine times … aliases."
    def level(i): return ('{<<: [%s]}' if merged else '[%s]') % ', '.join([f'*a{i - 1}'] * 9)
    return f"a0: &a0 {'{b: 1}' if merged else '[1]'}\n" + ''.join(f'a{i}: &a{i} {level(i)}\n' for i in range(1, n))

@pytest.mark.parametrize('text, words', [(laughs(30), 'unfolds to more than 100,000 values'), (laughs(30, True), 'unfolds to more than'), ('data: &a [*a]', 'unfolds to more than'), ('[' * 5000, 'not valid YAML'), ('a: ' + '[' * 900_000, 'not valid YAML'),
    ('\n'.join(f'k{i}: 1' for i in range(90_000)), 'p.yaml'), ('!!python/object/apply:os.system ["touch canary"]', "could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    ('!!python/name:os.system', 'python/name'), ('data: 2020-99-99', 'not valid YAML'), ('data: ' + '9' * 100_000, 'not valid YAML'), ('? {a: 1}\n: 1', 'unhashable'), ('data: p.yaml', 'leads back to itself'), ('\x00', 'not valid YAML'), ('a: ' + 'x' * 2_000_000, 'more than 1,000,000 bytes')])
def test_parameters_that_unfold_or_execute(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'p.yaml').write_text(text)
    began = time.process_time()
    with pytest.raises(ParamsError, match=words.replace('(', r'\(')) as e: load(GeneratorRun, 'p.yaml')
    assert 'p.yaml' in str(e.value) and time.process_time() - began < 30 and not (tmp_path/'canary').exists()

@pytest.mark.parametrize('name', ['../elsewhere', '/etc', '..', '.', '', 'a/b', 'a\n'])
def test_names_that_lead_out_of_the_folder(tmp_path, name):
    (tmp_path/'p.yaml').write_text(json.dumps({'dataset': name, 'nifti': 'x'}))
    with pytest.raises(ParamsError, match='dataset'): load(DataRun, tmp_path/'p.yaml')

@many(80)
@given(st.sampled_from(['split.csv', 'row.csv']), damage())
def test_damaged_tables(good, tmp_path_factory, name, change):
    file = tmp_path_factory.mktemp('tables')/name
    file.write_bytes(change((good/name).read_bytes())); file.with_suffix('.yaml').write_text('')
    answers(lambda: read_split(str(file)) if name == 'split.csv' else the_row(str(file)), file)

@many(80)
@given(st.booleans(), damage())
def test_damaged_answers_of_readers(tmp_path_factory, graded, change):
    key = {'format': FORMAT, 'study': 's', 'page': 'p', 'parameters': {'graded': graded}, 'images': [{'image': name, 'source': 'real' if name < 'c' else 'stylegan2'} for name in 'abcd']}
    file = tmp_path_factory.mktemp('answers')/'a.csv'
    file.write_bytes(change(simulated_reader(key, 'A', 1.).to_csv(index=False).encode()))
    answers(lambda: read_answers(key, [file]), file)

@pytest.mark.parametrize('commit', ['--help', '-B x', 'main; touch canary', '0123abcd --lock', 'HEAD', ''])
def test_a_commit_is_a_hash_before_git_sees_it(tmp_path, commit):
    with pytest.raises(ParamsError, match='is no hash of a commit'): code_of(commit, tmp_path/'code')

def test_a_cohort_with_a_damaged_note(good, tmp_path):
    shutil.copytree(good/'cohort', tmp_path/'cohort')
    (tmp_path/'cohort'/'simulated.json').write_text('[' * 100_000)
    with pytest.raises(InputError, match='simulated.json: is not valid JSON'): prepare(PrepareParams(nifti=str(tmp_path/'cohort'), resolution=16, workers=0), tmp_path/'store', progress=False)

@pytest.mark.parametrize('read', [lambda path: import_checkpoint(path, Path('made')), lambda path: load(GeneratorRun, path), lambda path: read_volume(path), lambda path: SliceStore.open(path), lambda path: load_generator(path)])
def test_what_is_no_file_is_not_read(tmp_path, read):
    "A device has no end, and a pipe waits for ever."
    os.mkfifo(tmp_path/'pipe')
    for path in (Path('/dev/zero'), tmp_path/'pipe'):
        with pytest.raises((ValueError, RuntimeError), match=str(path)): read(path)

# What a person sees

def test_a_message_holds_nothing_that_a_terminal_obeys(tmp_path, capsys):
    file = tmp_path/'x\x1b[2J\n.pkl'
    file.write_bytes(b'\x80\x04\x8c\x05os\x1b[1\x8c\x03s\ny\x93.')
    assert main(['import-checkpoint', str(file), str(tmp_path/'g')]) == 1
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and '\x1b' not in said and r'refused: os\x1b[1.s\ny' in said

def test_reading_a_report_executes_nothing(tmp_path):
    "Pages are made from notebooks as they stand."
    import nbformat
    from synthmr.studies.study import as_page
    note = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"open({str(tmp_path/'canary')!r}, 'w')")])
    nbformat.write(note, tmp_path/'report.ipynb')
    assert 'canary' in as_page(tmp_path/'report.ipynb') and not (tmp_path/'canary').exists()

# The page that promises all this

def test_every_promise_names_a_test_that_exists():
    rows = [line for line in (ROOT/'SECURITY.md').read_text().splitlines() if line.startswith('| ') and not line.startswith('| input')]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r'`tests/(\w+\.py)::(\w+)`', row)
        assert named, row
        for file, test in named: assert f'\ndef {test}(' in (ROOT/'tests'/file).read_text(), f'{file}::{test}'

def test_no_file_is_unpickled():
    loading = re.compile(r'\bpickle\.loads?\(|(?<!safetensors\.)torch\.load\(|np\.load\(|allow_pickle|read_pickle|\bmarshal\b|\bshelve\b|joblib|yaml\.(unsafe_load|full_load|load\((?!.*Loader=_Loader))')
    loads = {p.name for p in (ROOT/'synthmr').rglob('*.py') if p.name != '_modidx.py' and loading.search(p.read_text())}
    assert loads == {'measuring.py'}
