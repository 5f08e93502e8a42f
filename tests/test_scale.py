"At the size of BraTS 2021, 91,271 slices of 5x256x256 in 30 GB: memory does not grow with the number of slices. The images are holes in sparse files, so that no disk is needed; readers cannot tell."
import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from synthmr.batches import batches
from synthmr.images import image_hashes
from synthmr.slices import CHANNELS, SliceStore, StoreWriter, _npy_header

SHAPE, SIZES = (len(CHANNELS), 256, 256), (2_000, 91_271)
MARGIN = 200    # MB: two batches of 16 as bytes and as floats are 52 MB, which the allocator may keep twice; rows and order of 91,271 slices are 30 MB; the images that are read are 970 MB

def table(n: int) -> pd.DataFrame:
    "Rows of slices of subjects of 73."
    k = np.arange(n)
    return pd.DataFrame({'subject': [f'BraTS2021_{i:05d}' for i in k // 73], 'z': k % 73 + 40, 'tumour': k % 3 * 500, 'split': np.where(k // 73 % 22, 'train', 'test')})

def sparse_images(path: Path, n: int, header: bool=True):
    with open(path, 'wb') as f:
        if header: f.write(_npy_header({'descr': '|u1', 'fortran_order': False, 'shape': (n, *SHAPE)}))
        f.truncate(128 + n*int(np.prod(SHAPE)))

@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    "Finished stores of both sizes, and half-written ones with a line of the journal for every slice."
    place = tmp_path_factory.mktemp('scale')
    meta = {'resolution': 256, 'simulated': True}
    with StoreWriter(place/'one', meta) as writer:
        writer.append('a', np.zeros((1, *SHAPE), np.uint8), table(1).to_dict('records'))
        meta = writer.finish().meta
    zero = SliceStore.open(place/'one')
    for n in SIZES:
        rows, folder, partial = table(n), place/f'{n}', place/f'{n}-half.partial'
        folder.mkdir(); partial.mkdir()
        sparse_images(folder/'images.npy', n)
        rows.to_csv(folder/'slices.csv', index=False)
        (folder/'meta.json').write_text(json.dumps(meta))
        sparse_images(partial/'images.npy', n, header=False)
        (partial/'started.json').write_text(json.dumps({k: v for k, v in meta.items() if k != 'fingerprint'}))
        digest = image_hashes(zero[:]).hex()
        with open(partial/'journal.jsonl', 'w') as f:
            for i, row in enumerate(rows.to_dict('records')): f.write(json.dumps({'name': f'g{i}', 'rows': [row], 'note': None, 'hashes': digest}) + '\n')
    return place

def memory(place: Path, n: int, work: str) -> dict[str, float]:
    "Growth of the resident memory at its peak, in MB, over a process that has read one image; and the seconds."
    done = subprocess.run([sys.executable, __file__, place, str(n), work], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

def test_memory_does_not_grow_with_the_store(place):
    "Opening a store, selecting from it, 2,000 images by position and 60 batches for training."
    small, large = (memory(place, n, 'read') for n in SIZES)
    print(small, large)
    assert small['growth'] < MARGIN and large['growth'] < MARGIN

def test_a_writer_goes_on_with_91_271_lines_of_journal(place):
    "What grows is the table, about a kilobyte a slice; the images are 320."
    small, large = (memory(place, n, 'write') for n in SIZES)
    print(small, large)
    assert large['growth'] - small['growth'] < 150 and large['seconds'] < 20
    store = SliceStore.open(place/f'{SIZES[1]}-half')
    assert len(store) == SIZES[1] and store.slices.equals(SliceStore.open(place/f'{SIZES[1]}').slices) and len(store.fingerprint) == 16

def _resident(field: str) -> float: return next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(field)) * 1024 / 1e6

if __name__ == '__main__':
    place, n, work = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    warm = SliceStore.open(place/'one')
    next(batches([warm], 1, 0)); warm.where(split='test'); pd.DataFrame(warm.slices.to_dict('records')).to_csv()
    Path('/proc/self/clear_refs').write_text('5')   # the peak begins here
    before, began = _resident('VmRSS:'), time.perf_counter()
    if work == 'write':
        with StoreWriter(place/f'{n}-half', {k: v for k, v in warm.meta.items() if k in ('resolution', 'simulated')}) as writer:
            assert len(writer.rows) == n
            store = writer.finish()
    else:
        store = SliceStore.open(place/f'{n}')
        training = store.where(split='train').with_tumour()
        assert 0 < len(training) < len(store) and len(store.subjects) == -(-n // 73)
        for i in np.random.default_rng(0).integers(0, n, 2000): assert not store[int(i)][4, 0, 0]
        for batch in islice(batches([training, store], 16, 0), 60): assert batch.shape == (16, *SHAPE)
    print(json.dumps({'growth': round(_resident('VmHWM:') - before, 1), 'seconds': round(time.perf_counter() - began, 2)}))
