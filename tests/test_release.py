"A release: accepted by the BIDS validator and by mlcroissant, the same bytes every time, nothing of a patient or of the machine in it, whole or not there."
import gzip
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image

from synthmr.cli import main
from synthmr.data.imported import ImportParams, import_images
from synthmr.data.prepare import PrepareParams, prepare
from synthmr.data.simulated import SimulatedParams, simulate_cohort
from synthmr.generators.families import build_generator
from synthmr.generators.sampling import sample_store
from synthmr.generators.stylegan2 import StyleGAN2Params
from synthmr.privacy.cards import ReleaseParams
from synthmr.privacy.licences import ReleaseError
from synthmr.privacy.release import release
from synthmr.slices import SliceStore, StoreWriter

NETWORK = StyleGAN2Params(latents=8, width=8, mapping_layers=1, channel_base=64, channel_max=8)
PARAMS = ReleaseParams(licence='CC-BY-4.0', authors=['A. Example', 'B. Example'], date='2026-01-31', url='https://example.org/data')

@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    "A folder whose name is as telling as that of a hospital."
    return tmp_path_factory.mktemp('hospital-secret')

@pytest.fixture(scope='module')
def real(place) -> SliceStore:
    "Three simulated patients with telling names and headers."
    simulate_cohort(place/'cohort', SimulatedParams(subjects=3, spacing=5, workers=0), progress=False)
    for file in sorted((place/'cohort').glob('*/*.nii.gz')):
        image, name = nib.load(file), file.name.replace('SIM_0000', 'MUSTERMANN_1958032')
        image.header['descrip'], image.header['db_name'] = b'scan of 1998-03-21', b'KARLSSON'
        (place/'nifti').mkdir(exist_ok=True); image.to_filename(place/'nifti'/name)
    return prepare(PrepareParams(nifti=str(place/'nifti'), resolution=32, test_share=0.4, workers=0), place/'real', progress=False)

@pytest.fixture(scope='module')
def generator(place, real) -> Path:
    "An untrained network in the folder of a run whose configuration names files."
    made = build_generator(NETWORK, 32, 0)
    (place/'run/training').mkdir(parents=True)
    safetensors.torch.save_file(made.averaged.state_dict(), place/'run/training/weights.safetensors', {'host': socket.gethostname(), 'date': '1998-03-21'})
    (place/'run/training/config.json').write_text(json.dumps({'data': {'nifti': str(place/'nifti'), 'dataset': 'hospital'}, 'generator': NETWORK.model_dump(mode='json')}))
    return place/'run'

@pytest.fixture(scope='module')
def synthetic(place, real, generator) -> SliceStore:
    "Its images, with everything in meta.json that a study leaves there."
    torch.manual_seed(0)
    run = {'data': {'dataset': 'hospital', 'nifti': str(place/'nifti'), 'split': str(place/'split.csv')}, 'generator': NETWORK, 'seed': 3}
    meta = {'spacing': real.meta['spacing'], 'simulated': True, 'generator': run, 'generator_name': 'stylegan2-mine', 'provenance': {'host': socket.gethostname(), 'folder': str(place)}}
    return sample_store(build_generator(NETWORK, 32, 0), place/'synthetic', 70, 3, meta, progress=False)

def audit(folder, synthetic, real, name='audit.json', verdict='pass', **differs) -> Path:
    "An audit as `synthmr audit` writes it, its paths included."
    store = {'path': str(real.path), 'fingerprint': real.fingerprint, 'images': len(real), 'subjects': 2, 'split': 'train'}
    criteria = [{'name': 'copies', 'passed': verdict == 'pass', 'value': 0, 'low': None, 'high': None, 'limit': 0, 'reason': 'none of 70 synthetic images is a copy of a training image'}]
    result = {'verdict': verdict, 'reasons': [] if verdict == 'pass' else ['3 of 70 images are copies'], 'criteria': criteria, 'counts': {'images': 0, 'copies': 0}, 'thresholds': {'copy': 7.25}, 'attacks': [{'attack': 'ratio', 'value': 0.5}]}
    content = {'format': 'synthmr audit 1', 'verdict': verdict, 'simulated': True, 'synthetic': {**store, 'path': str(synthetic.path), 'fingerprint': synthetic.fingerprint}, 'training': store, 'held_out': store, 'result': result,
               'made': {'device': 'secret', 'host': socket.gethostname()}, **differs}
    (folder/name).write_text(json.dumps(content))
    return folder/name

@pytest.fixture(scope='module')
def audited(place, synthetic, real) -> Path: return audit(place, synthetic, real)

@pytest.fixture(scope='module', params=['nifti', 'png'])
def released(request, place, synthetic, audited, generator) -> Path:
    return release(synthetic, place/f'release-{request.param}', PARAMS.model_copy(update={'form': request.param}), audited, generator, progress=False)

@pytest.fixture(scope='module')
def bids(place, synthetic, audited, generator) -> Path:
    return release(synthetic, place/'release-bids', PARAMS, audited, generator, progress=False)

def validated(folder) -> list[dict]:
    "What the BIDS validator says."
    done = subprocess.run([Path(sys.executable).with_name('bids-validator-deno'), folder, '--format', 'json', '--max-rows', '-1'], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found['summary']['totalFiles'] and found['summary']['dataTypes'] == ['anat'], done.stderr
    return found['issues']['issues']

def test_the_bids_validator_accepts_it(bids):
    issues = validated(bids)
    assert [(i['severity'], i['code'], i['location']) for i in issues if i['severity'] == 'error'] == []
    assert {i['code'] for i in issues} <= {'SIDECAR_KEY_RECOMMENDED'}, {i['code'] for i in issues}     # SpatialReference: there is no other image to refer to

def test_the_bids_validator_would_not_accept_a_wrong_one(bids, tmp_path):
    copy = shutil.copytree(bids, tmp_path/'copy')
    (copy/'dataset_description.json').write_text('{"Name": "x"}'); (copy/'preview.png').touch()
    assert {'JSON_KEY_REQUIRED', 'NOT_INCLUDED'} <= {i['code'] for i in validated(copy) if i['severity'] == 'error'}

def test_the_bids_validator_accepts_more_participants_than_it_reads_by_default(tmp_path, real):
    with StoreWriter(tmp_path/'many', {'resolution': 4, 'spacing': [1, 1, 1], 'simulated': True}) as writer:
        writer.append('all', np.zeros((1001, 5, 4, 4), np.uint8), [dict(seed=0, number=i, split='train', tumour=0) for i in range(1001)])
        store = writer.finish()
    out = release(store, tmp_path/'out', PARAMS.model_copy(update={'generator': 'nothing'}), audit(tmp_path, store, real), progress=False)
    assert [i['code'] for i in validated(out) if i['severity'] == 'error'] == [] and '--max-rows -1' in (out/'README.md').read_text()

def test_croissant_is_valid_and_leads_to_the_images(released, synthetic):
    mlcroissant = pytest.importorskip('mlcroissant')
    found = mlcroissant.Dataset(jsonld=released/'croissant.json')
    assert not found.metadata.ctx.issues.errors and not found.metadata.ctx.issues.warnings
    table = 'participants' if 'nifti' in released.name else 'images'
    rows = list(found.records(table))
    assert len(rows) == 70 and found.metadata.license == ['https://creativecommons.org/licenses/by/4.0/']
    assert [r[f'{table}/number'] for r in rows] == synthetic.slices.number.tolist() and [r[f'{table}/tumour_pixels'] for r in rows] == synthetic.slices.tumour.tolist()
    if table == 'images':
        files = {(f['files/channel'].decode(), f['files/image'].decode()): f['files/pixels'] for f in found.records('files')}
        assert len(files) == 350 and np.array_equal(np.asarray(files['T1CE', 'sample_000012'])[..., 0], synthetic[12][1])
        assert {name for _, name in files} == {r['images/image'].decode() for r in rows}
    else: assert {r['participants/participant_id'].decode() for r in rows} == {p.name for p in released.glob('sub-*')}

def test_checksums_cover_every_file(released):
    assert subprocess.run(['sha256sum', '-c', '--quiet', '--strict', 'SHA256SUMS'], cwd=released).returncode == 0
    assert {str(p.relative_to(released)) for p in released.rglob('*') if p.is_file()} == {line.split('  ')[1] for line in (released/'SHA256SUMS').read_text().splitlines()} | {'SHA256SUMS'}

def test_the_images_come_back_bit_for_bit(released, synthetic, tmp_path):
    back = import_images(ImportParams(folder=str(released), spacing=tuple(synthetic.meta['spacing'])), tmp_path/'back', progress=False)
    assert np.array_equal(back[:], synthetic[:]) and back.slices.number.tolist() == synthetic.slices.number.tolist() and back.meta['spacing'] == synthetic.meta['spacing']

def contents(folder):
    "Every file as bytes, unpacked where it is compressed, with its name."
    for path in sorted(p for p in folder.rglob('*') if p.is_file()):
        content = path.read_bytes()
        yield str(path.relative_to(folder)), gzip.decompress(content) if path.suffix == '.gz' else content

def test_nothing_of_a_patient_or_of_the_machine_is_in_it(released, place, real):
    "Names, paths, host, user and dates of the training subjects' files, in every file and every name."
    words = [*real.subjects, 'MUSTERMANN', '19580321', 'KARLSSON', '1998-03', str(place), place.name, str(Path.home()), 'secret', 'stylegan2-mine', 'split.csv', real.fingerprint] + [w for w in (socket.gethostname(), os.environ.get('USER', '')) if len(w) > 5]
    assert len(real.subjects) == 3 and all(s.startswith('MUSTERMANN') for s in real.subjects)
    for name, content in contents(released):
        for word in words: assert word.encode() not in content and word not in name, (name, word)
    assert any(real.subjects[0].encode() in content for _, content in contents(real.path))     # they would be found

def test_headers_are_fresh(bids, released):
    for path in bids.rglob('*.nii.gz'):
        raw = path.read_bytes()
        assert raw[3] == 0 and raw[4:8] == bytes(4)     # gzip: no name, no comment, no time
        image = nib.load(path)
        text = b''.join(bytes(image.header[k].tobytes()).strip(b'\0') for k in ('data_type', 'db_name', 'aux_file', 'intent_name'))
        assert text == b'' and not image.header.extensions and bytes(image.header['descrip'].tobytes()).strip(b'\0') == b'SYNTHETIC, not a patient'
    for path in released.rglob('*.png'):
        with Image.open(path) as image: assert not image.info and not image.getexif()

def test_weights_are_tensors_and_nothing_else(bids, generator):
    with safetensors.safe_open(bids/'weights/weights.safetensors', 'pt') as file: assert file.metadata() is None
    theirs, ours = (safetensors.torch.load_file(p/'weights.safetensors') for p in (generator/'training', bids/'weights'))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in ours)
    config = json.loads((bids/'weights/config.json').read_text())
    assert config['weights'] == hashlib.sha256((bids/'weights/weights.safetensors').read_bytes()).hexdigest() and config['generator']['kind'] == 'stylegan2' and set(config) == {'generator', 'resolution', 'weights'}
    assert 'not on its weights' in (bids/'weights/README.md').read_text()

def test_the_same_store_gives_the_same_bytes_and_times(bids, synthetic, audited, generator, tmp_path):
    time.sleep(1.1)
    again = release(SliceStore.open(shutil.copytree(synthetic.path, tmp_path/'elsewhere')), tmp_path/'again', PARAMS, shutil.copy(audited, tmp_path/'a.json'), shutil.copytree(generator, tmp_path/'run'), progress=False)
    assert (again/'SHA256SUMS').read_bytes() == (bids/'SHA256SUMS').read_bytes()
    assert {p.stat().st_mtime for p in (again, *again.rglob('*'))} == {315_532_800}

def test_the_card_says_what_it_has_to(released):
    card = (released/'README.md').read_text()
    for words in ('simulated patients, none of them real', 'Nobody was imaged', 'Verdict: **pass**', '2 training and 2 held-out subjects', 'CC-BY-4.0', 'legal advice', 'Not for diagnosis', 'to be checked'): assert words in card, words
    assert '70 synthetic axial' in card and 'none of 70 synthetic images is a copy' in card and '7.25' in card

def test_a_failed_audit_is_refused_unless_a_reason_is_given(synthetic, real, tmp_path):
    failed = audit(tmp_path, synthetic, real, verdict='fail')
    with pytest.raises(ReleaseError, match='3 of 70 images are copies'): release(synthetic, tmp_path/'out', PARAMS, failed, progress=False)
    assert not (tmp_path/'out').exists()
    card = (release(synthetic, tmp_path/'out', PARAMS.model_copy(update={'despite': 'to show what a failed audit looks like'}), failed, progress=False)/'README.md').read_text()
    assert 'although the audit failed' in card and 'to show what a failed audit looks like' in card and '3 of 70 images are copies' in card

def test_an_audit_of_other_images_is_refused(synthetic, real, audited, tmp_path):
    copy = shutil.copytree(synthetic.path, tmp_path/'changed')
    with open(copy/'images.npy', 'r+b') as f: f.seek(-500, os.SEEK_END); f.write(b'\xfe')
    with pytest.raises(ReleaseError, match='not those that its fingerprint'): release(SliceStore.open(copy), tmp_path/'out', PARAMS, audited, progress=False)
    meta = json.loads((copy/'meta.json').read_text()); del meta['fingerprint']; (copy/'meta.json').write_text(json.dumps(meta))
    with pytest.raises(ReleaseError, match='audit of other images'): release(SliceStore.open(copy), tmp_path/'out', PARAMS, audited, progress=False)
    assert not (tmp_path/'out').exists() and not (tmp_path/'out.partial').exists()

def test_patients_other_than_those_of_the_audit_are_refused(synthetic, real, audited, tmp_path):
    other = shutil.copytree(real.path, tmp_path/'other')
    meta = json.loads((other/'meta.json').read_text()); (other/'meta.json').write_text(json.dumps({**meta, 'fingerprint': 'f' * 16}))
    with pytest.raises(ReleaseError, match='other patients'): release(synthetic, tmp_path/'out', PARAMS, audited, training=SliceStore.open(other), progress=False)
    gone = audit(tmp_path, synthetic, real, training={'path': str(tmp_path/'nowhere'), 'fingerprint': real.fingerprint, 'subjects': 2})
    with pytest.raises(ReleaseError, match='--training'): release(synthetic, tmp_path/'out', PARAMS, gone, progress=False)
    assert release(synthetic, tmp_path/'out', PARAMS, gone, training=real, progress=False).is_dir()

def test_nothing_but_a_licence_is_enough_for_both_validators(synthetic, audited, tmp_path):
    out = release(synthetic, tmp_path/'out', ReleaseParams(licence='as agreed with the board'), audited, progress=False)
    assert [i for i in validated(out) if i['severity'] == 'error'] == []
    assert not pytest.importorskip('mlcroissant').Dataset(jsonld=out/'croissant.json').metadata.ctx.issues.errors

def test_patients_are_never_released(real, tmp_path, audited):
    with pytest.raises(ReleaseError, match='holds patients'): release(real, tmp_path/'out', PARAMS, audited, progress=False)

@pytest.mark.parametrize('field', ['title', 'terms', 'generator', 'url'])
def test_words_that_tell_on_a_patient_stop_it(synthetic, real, audited, tmp_path, field):
    with pytest.raises(ReleaseError, match=real.subjects[0]): release(synthetic, tmp_path/'out', PARAMS.model_copy(update={field: f'as in {real.subjects[0]}'}), audited, progress=False)
    with pytest.raises(ReleaseError, match='path or a machine'): release(synthetic, tmp_path/'out', PARAMS.model_copy(update={field: f'from {real.path}'}), audited, progress=False)
    assert not list(tmp_path.glob('out*'))

def test_weights_of_another_generator_are_refused(synthetic, audited, generator, tmp_path):
    other = shutil.copytree(generator, tmp_path/'other')
    config = json.loads((other/'training/config.json').read_text()); config['generator']['latents'] = 16
    (other/'training/config.json').write_text(json.dumps(config))
    with pytest.raises(ReleaseError, match='not the weights of the generator'): release(synthetic, tmp_path/'out', PARAMS, audited, other, progress=False)
    (other/'training/weights.safetensors').write_bytes(b'{}')
    with pytest.raises(ReleaseError, match='cannot be read'): release(synthetic, tmp_path/'out', PARAMS, audited, other, progress=False)

def test_volumes_are_chunks_of_one_participant(tmp_path, real):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 32, 32), np.uint8)
    images[:, 4] = images[:, 4] // 64 % 4 * 51 // 153 * 204
    with StoreWriter(tmp_path/'volumes', {'resolution': 32, 'spacing': [5, 5, 5], 'simulated': True}) as writer:
        writer.append('all', images, [dict(seed=0, number=n, z=z, split='train', tumour=int((images[3*n + z, 4] > 0).sum())) for n in range(2) for z in range(3)])
        store = writer.finish()
    out = release(store, tmp_path/'out', PARAMS.model_copy(update={'generator': 'a generator of volumes'}), audit(tmp_path, store, real), progress=False)
    assert {i['code'] for i in validated(out)} <= {'SIDECAR_KEY_RECOMMENDED'}
    assert len(list(out.glob('sub-000001/anat/sub-000001_*chunk-002_*'))) == 5 and pd.read_csv(out/'participants.tsv', sep='\t').slices.tolist() == [3, 3]
    assert nib.load(out/'sub-000001/anat/sub-000001_chunk-002_desc-synthetic_T2w.nii.gz').affine[2, 3] == 10

def test_command(place, synthetic, audited, generator, tmp_path, capsys):
    command = ['release', str(synthetic.path), str(tmp_path/'out'), '--audit', str(audited), '--licence', 'CC-BY-4.0', '--weights', str(generator), '--authors', 'A. Example', 'B. Example']
    assert main(command) == 0 and 'audit: pass' in capsys.readouterr().out
    assert main(command) == 1 and 'exists already' in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path/'other'), *command[3:], '--date', 'today']) == 2 and 'date' in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path/'other'), *command[3:], '--source', 'our hospital']) == 1 and len(capsys.readouterr().err.splitlines()) == 1

def test_a_kill_leaves_nothing_that_looks_like_a_release(place, synthetic, audited, tmp_path):
    command = [Path(sys.executable).with_name('synthmr'), 'release', synthetic.path, tmp_path/'out', '--audit', audited, '--licence', 'CC0-1.0']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path/'out.partial').glob('sub-*/anat/*')): assert process.poll() is None; time.sleep(0.001)
    process.send_signal(signal.SIGKILL); process.wait()
    assert not (tmp_path/'out').exists()
    (tmp_path/'out.partial/left.txt').write_text('from before')
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path/'out/SHA256SUMS').is_file() and not (tmp_path/'out.partial').exists() and not (tmp_path/'out/left.txt').exists()

def test_a_folder_that_is_in_the_way_is_not_removed(synthetic, audited, tmp_path):
    (tmp_path/'out.partial').mkdir(); (tmp_path/'out.partial/thesis.tex').write_text('mine')
    with pytest.raises(ReleaseError, match='in the way'): release(synthetic, tmp_path/'out', PARAMS, audited, progress=False)
    assert (tmp_path/'out.partial/thesis.tex').read_text() == 'mine'
