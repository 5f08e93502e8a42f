"Sampling that is killed by SIGKILL, and batches of different sizes. Run with arguments, this file is the victim."
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from synthmr.generators.sampling import numbered_noise, sample_store
from synthmr.slices import StoreError

N, META = 40, {'spacing': [1, 1, 1], 'generator': 'noise'}

class Noise:
    "Noise through a curve, at leisure."
    resolution = 16
    def __init__(self, pause=0): self.pause = pause
    def generate(self, seed, numbers): time.sleep(self.pause * len(numbers)); return numbered_noise(seed, numbers, (5, 16, 16)).tanh()

def sample(folder: Path, batch_size: int, pause: float=0, n: int=N, seed: int=7, meta: dict=META):
    return sample_store(Noise(pause), folder, n, seed, meta, batch_size=batch_size, progress=False)

def test_batch_size(tmp_path):
    "Image i is the same for any batch size."
    stores = [sample(tmp_path/str(size), size) for size in (1, 3, 8, 100)]
    for store in stores[1:]: assert (store[:] == stores[0][:]).all() and store.slices.equals(stores[0].slices) and store.meta == stores[0].meta
    assert len({image.tobytes() for image in stores[0][:]}) == N
    assert (sample(tmp_path/'seed', 8, seed=8)[:] != stores[0][:]).any((1, 2, 3)).all()

def test_noise_is_numbered():
    "A row depends on (seed, number, stream) alone, in large and small amounts."
    for shape in ((), (3,), (5, 64, 64)):
        many = numbered_noise(1, range(40), shape)
        for numbers in ([0], [39, 3, 3], range(5, 9)): assert torch.equal(numbered_noise(1, numbers, shape), many[list(numbers)])
    many = [numbered_noise(seed, [number], (9,), stream) for seed in (0, 1, 2**40) for number in (0, 1, 2**33) for stream in (0, 1)]
    assert len({tuple(m.flatten().tolist()) for m in many}) == len(many)

def test_sigkill(tmp_path):
    "Killed twice at random moments, with other batch sizes each time: no image is lost or doubled."
    folder, images = tmp_path/'killed', tmp_path/'killed.partial'/'images.npy'
    for size, at in ((4, random.randrange(3, 12)), (7, random.randrange(20, 30))):
        process = subprocess.Popen([sys.executable, __file__, folder, str(size), '0.02'])
        while not images.exists() or images.stat().st_size < at*5*16*16:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL); process.wait()
        assert not folder.exists()
    store, whole = sample(folder, 3), sample(tmp_path/'whole', 8)
    assert (store[:] == whole[:]).all() and store.slices.equals(whole.slices) and store.slices.number.tolist() == list(range(N))

def test_finished(tmp_path):
    "A finished store returns at once; another one is refused; provenance may differ."
    store = sample(tmp_path/'a', 8, meta={**META, 'provenance': {'commit': 'a'}})
    assert store.meta['provenance'] == {'commit': 'a'}
    assert (sample(tmp_path/'a', 8, pause=100, meta={**META, 'provenance': {'commit': 'b'}})[:] == store[:]).all()
    for changed, name in ((dict(n=41), 'images'), (dict(seed=8), 'seed'), (dict(meta={**META, 'generator': 'other'}), 'generator')):
        with pytest.raises(StoreError, match=rf'\({name}\)'): sample(tmp_path/'a', 8, **changed)

if __name__ == '__main__': sample(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
