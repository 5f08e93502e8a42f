"Two real patients: the protocol by an independent, plain implementation."
import nibabel as nib
import numpy as np
import pytest

from synthmr.data.nifti import find_subjects
from synthmr.data.prepare import PrepareParams, prepare

def plainly(files) -> tuple[np.ndarray, np.ndarray]:
    "The protocol in float64, step by step: images (n, 5, 256, 256) and their z."
    volumes = {channel: nib.load(path).get_fdata() for channel, path in files.items()}
    scaled = {c: v / v.max() * 255 if c != 'annotation' else v * 51 for c, v in volumes.items()}
    padded = {c: np.pad(v, ((8, 8), (8, 8), (0, 0))) for c, v in scaled.items()}
    z = [k for k in range(155) if (padded['T1w'][..., k] > 50).sum() > 0.15 * 256 * 256]
    def rounded(v): return np.clip(np.where(v >= 0, np.floor(v + 0.5), np.ceil(v - 0.5)), 0, 255).astype(np.uint8)
    return np.stack([np.stack([rounded(padded[c][..., k]).T for c in ('T1w', 'T1wGd', 'T2w', 'FLAIR', 'annotation')]) for k in z]), np.array(z)

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    from conftest import SHARED
    if not SHARED.is_dir(): pytest.skip(f'{SHARED} is not there')
    return prepare(PrepareParams(nifti=str(SHARED/'real')), tmp_path_factory.mktemp('real')/'store', progress=False)

@pytest.mark.parametrize('name', ['TCGA-DU-7294', 'TCGA-FG-6692'])
def test_bit_for_bit_the_protocol(store, shared, name):
    images, z = plainly(find_subjects(shared/'real')[name].files)
    mine = store.where(subject=name)
    assert mine.slices.z.tolist() == z.tolist() and np.array_equal(mine[:], images)

def test_both_are_there_and_nothing_was_skipped(store):
    assert store.subjects == ['TCGA-DU-7294', 'TCGA-FG-6692'] and store.meta['skipped'] == [] and not store.meta['simulated']
    assert store.meta['spacing'] == [1, 1, 1] and set(store.slices.split) == {'train', 'test'}
    assert set(np.unique(store[:][:, 4])) <= {0, 51, 102, 204}
