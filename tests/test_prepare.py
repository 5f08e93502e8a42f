"Preparation: every kind of bad input is named and stops nothing else; a killed one resumes to the same bytes."
import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from synthmr.data.nifti import InputError, find_subjects
from synthmr.data.prepare import PrepareParams, choose_split, prepare, prepare_subject, read_split
from synthmr.data.simulated import SimulatedParams, simulate_cohort
from synthmr.slices import SliceStore, StoreError

@pytest.fixture(scope='module')
def cohort(tmp_path_factory) -> Path:
    "Four simulated subjects on a coarse grid."
    folder = tmp_path_factory.mktemp('data')/'cohort'
    simulate_cohort(folder, SimulatedParams(subjects=4, spacing=5, workers=2), progress=False)
    return folder

@pytest.fixture
def mine(cohort, tmp_path) -> Path: return shutil.copytree(cohort, tmp_path/'mine')

def file(folder, name, i=1) -> Path: return folder/f'SIM_{i:05d}'/f'SIM_{i:05d}_{name}.nii.gz'

def params(folder, **kw) -> PrepareParams: return PrepareParams(**{'nifti': str(folder), 'resolution': 16, 'test_share': 0.5, 'workers': 0, **kw})

def rewrite(path, change=lambda v: v, **header):
    "Put a changed volume, or fields of the header, into a file."
    image = nib.load(path)
    data = change(np.asanyarray(image.dataobj))
    affine = header.pop('affine', image.affine)
    new = nib.Nifti1Image(data, affine)
    new.header.set_data_dtype(data.dtype)
    new.to_filename(path)

def raw(path, at, value): # replace bytes of the header
    data = bytearray(gzip.decompress(path.read_bytes())); data[at:at + len(value)] = value
    path.write_bytes(gzip.compress(bytes(data)))

def moved(image_path):
    affine = nib.load(image_path).affine.copy(); affine[0, 3] += 30
    rewrite(image_path, affine=affine)

BAD = {
    'missing sequence': (lambda f: file(f, 't2').unlink(), 'no file for T2w'),
    'truncated gzip': (lambda f: file(f, 'flair').write_bytes(file(f, 'flair').read_bytes()[:-900]), 'flair.nii.gz: truncated'),
    'other shape': (lambda f: rewrite(file(f, 't1ce'), lambda v: v[:-1]), 't1ce.nii.gz: 47x48x31 voxels, but SIM_00001_t1.nii.gz has 48x48x31'),
    'other affine': (lambda f: moved(file(f, 't2')), 't2.nii.gz: lies elsewhere in space'),
    'NaN': (lambda f: rewrite(file(f, 't1'), lambda v: np.where(v == v.max(), np.nan, v).astype(np.float32)), 't1.nii.gz: holds NaN'),
    'empty volume': (lambda f: rewrite(file(f, 'flair'), lambda v: v * 0), 'flair.nii.gz: the volume is empty'),
    'unknown labels': (lambda f: rewrite(file(f, 'seg'), lambda v: np.where(v == 4, 7, v).astype(np.uint8)), 'seg.nii.gz: labels [7]; known are 0, 1, 2 and 4'),
    'absurd header': (lambda f: raw(file(f, 't2'), 40, np.array([3, 32000, 32000, 32000], '<i2').tobytes()), 't2.nii.gz: absurd header: 32000 x 32000 x 32000 voxels'),
    'not NIfTI': (lambda f: file(f, 't1').write_bytes(b'<html>404</html>' * 40), 't1.nii.gz: not a NIfTI file'),
    'other voxel size': (lambda f: [rewrite(file(f, n), affine=np.diag([-4, -4, 4, 1.])) for n in ('t1', 't1ce', 't2', 'flair', 'seg')], 'mm (z, y, x), those of the subjects before'),
}

@pytest.mark.parametrize('kind', BAD)
def test_bad_input_is_named_and_stops_nothing_else(kind, mine, tmp_path, capsys):
    spoil, message = BAD[kind]
    spoil(mine)
    store = prepare(params(mine), tmp_path/'store')
    assert store.subjects == ['SIM_00000', 'SIM_00002', 'SIM_00003']
    skipped, = store.meta['skipped']
    assert skipped['subject'] == 'SIM_00001' and message in skipped['reason']
    assert message in capsys.readouterr().out
    with pytest.raises(InputError, match='1 subjects cannot be used: SIM_00001'): prepare(params(mine, strict=True), tmp_path/'strict', progress=False)

def test_an_absurd_header_is_refused_before_memory_is_asked_for(mine, tmp_path):
    import resource
    raw(file(mine, 't1'), 40, np.array([3, 32000, 32000, 32000], '<i2').tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match='absurd header'): prepare_subject(find_subjects(mine)['SIM_00001'], 16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000    # kB

def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(InputError, match='no such folder'): prepare(params(tmp_path/'nowhere'), tmp_path/'store')
    (tmp_path/'empty').mkdir()
    with pytest.raises(InputError, match='no subjects'): prepare(params(tmp_path/'empty'), tmp_path/'store')
    assert not (tmp_path/'store').exists()

@pytest.mark.parametrize('names, label', [(('t1', 't1ce', 't2', 'flair', 'seg'), 4), (('t1n', 't1c', 't2w', 't2f', 'seg'), 3)])
@pytest.mark.parametrize('flat', [True, False])
def test_names_of_all_years(names, label, flat, cohort, tmp_path):
    mark, years = ('_', 'BraTS20_Training_001') if label == 4 else ('-', 'BraTS-GLI-00001-000')
    folder = tmp_path/'data' if flat else tmp_path/'data'/years
    folder.mkdir(parents=True)
    for old, new in zip(('t1', 't1ce', 't2', 'flair', 'seg'), names):
        target = folder/f'{years}{mark}{new}.nii.gz'
        shutil.copy(file(cohort, old), target)
        if new == 'seg' and label == 3: rewrite(target, lambda v: np.where(v == 4, 3, v).astype(np.uint8))
    found, = find_subjects(tmp_path/'data').values()
    theirs, ours = prepare_subject(found, 16)[0], prepare_subject(find_subjects(cohort)['SIM_00001'], 16)[0]
    assert found.name == years and np.array_equal(theirs, ours) and 204 in theirs[:, -1]

def test_the_number_of_processes_changes_nothing(cohort, tmp_path):
    stores = [prepare(params(cohort, workers=w), tmp_path/str(w), progress=False) for w in (0, 1, 3)]
    for store in stores[1:]: assert (store[:] == stores[0][:]).all() and store.slices.equals(stores[0].slices) and store.meta == stores[0].meta

def test_subjects_not_slices_are_split(cohort, tmp_path):
    store = prepare(params(cohort), tmp_path/'store', progress=False)
    assert not set(store.where(split='train').subjects) & set(store.where(split='test').subjects)
    assert len(store.where(split='test').subjects) == 2

def test_a_split_of_ones_own(cohort, tmp_path):
    csv = tmp_path/'mine.csv'
    csv.write_text('subject,split\nSIM_00000,test\nSIM_00001,train\nSIM_00002,train\nelsewhere,train\n')
    store = prepare(params(cohort, split=str(csv)), tmp_path/'store', progress=False)
    assert store.where(split='test').subjects == ['SIM_00000'] and store.meta['absent'] == ['elsewhere']
    assert [(r['subject'], r['reason']) for r in store.meta['skipped']] == [('SIM_00003', 'not in the split')]
    for text, word in (('subject,split\nA,train\nA,test\n', 'A stands twice'), ('subject,split\nA,validation\n', "'validation'"), ('id,set\n', 'columns subject and split')):
        csv.write_text(text)
        with pytest.raises(InputError, match=word): read_split(str(csv))

def test_the_authors_splits(shared):
    for year in (2020, 2021):
        assert read_split(f'brats{year}') == read_split(str(shared/'paper'/f'split_brats{year}.csv'))
    assert choose_split(['BraTS2021_00000'], PrepareParams()) == read_split('brats2021')

def test_a_finished_store_is_taken_as_it_is(cohort, tmp_path):
    prepare(params(cohort), tmp_path/'store', progress=False)
    written = (tmp_path/'store'/'images.npy').stat().st_mtime_ns
    prepare(params(cohort, workers=1), tmp_path/'store', progress=False)
    assert (tmp_path/'store'/'images.npy').stat().st_mtime_ns == written
    with pytest.raises(StoreError, match='other parameters'): prepare(params(cohort, resolution=32), tmp_path/'store', progress=False)

SCRIPT = """
import sys, time
import synthmr.data.prepare as p
whole = p._attempt
def slow(*a, **kw): time.sleep(0.25); return whole(*a, **kw)
p._attempt = slow
p.prepare(p.PrepareParams(nifti=sys.argv[1], resolution=16, test_share=0.5, workers=int(sys.argv[3])), sys.argv[2], progress=False)
"""

@pytest.mark.parametrize('workers, groups', [(0, 1), (2, 2)])
def test_killed_and_resumed_is_byte_for_byte_the_same(workers, groups, cohort, tmp_path):
    whole = prepare(params(cohort), tmp_path/'whole', progress=False)
    process = subprocess.Popen([sys.executable, '-c', SCRIPT, cohort, tmp_path/'killed', str(workers)], start_new_session=True)
    journal = tmp_path/'killed.partial'/'journal.jsonl'
    while not (journal.is_file() and journal.read_bytes().count(b"\n") >= groups):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path/'killed').exists()
    with pytest.raises(StoreError, match='half written'): SliceStore.open(tmp_path/'killed')
    prepare(params(cohort), tmp_path/'killed', progress=False)
    for name in ('images.npy', 'slices.csv', 'meta.json'): assert (tmp_path/'killed'/name).read_bytes() == (whole.path/name).read_bytes()
