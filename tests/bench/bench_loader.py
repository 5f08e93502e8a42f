"""Loading batches: five PNGs a slice / ours, ours / memcpy; 256x256x5 to float32 in [-1, 1], one process, one thread."""
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from synthmr.slices import StoreWriter, batch_order, batches, to_float

def head(rng) -> np.ndarray:
    "Five channels of smooth noise in a disc: compresses about as a brain does."
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    coarse = np.kron(rng.normal(0, 20, (5, 32, 32)), np.ones((8, 8))) + rng.normal(0, 6, (5, 256, 256)) + 120
    return (np.clip(coarse, 1, 255) * (np.hypot(x, y) < 0.7)).astype(np.uint8)

def main(n: int=256, size: int=16, rounds: int=7):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}); torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with StoreWriter(folder/'store', {'resolution': 256}) as writer:
            writer.append('A', np.stack([head(rng) for _ in range(n)]), [dict(subject='A', z=z, split='train', tumour=0) for z in range(n)])
            store = writer.finish()
        for i, image in enumerate(store[:]):
            for c, channel in enumerate(image): Image.fromarray(channel).save(folder/f'{i}_{c}.png')
        order, mine = batch_order([n], size, seed=0), batches([store], size, seed=0)
        source, target = store[:size], np.empty((size, 5, 256, 256), np.uint8)

        def png():
            positions = next(order)[1]
            return to_float(torch.from_numpy(np.stack([[np.asarray(Image.open(folder/f'{i}_{c}.png')) for c in range(5)] for i in positions])))
        def ours(): return next(mine)
        def memcpy(): target[:] = source

        assert torch.equal(png(), ours())
        times = {f: [] for f in (png, ours, memcpy)}
        for _ in range(rounds):
            for f in times:
                start = time.perf_counter()
                for _ in range(4): f()
                times[f].append((time.perf_counter() - start) / (4*size))
        peer, own, floor = (1000 * statistics.median(t) for t in times.values())
        print(f'{n} slices of 5x256x256, batches of {size}, identical batches; median of {rounds}, 1 core, 1 thread')
        print(f'five PNGs {peer:.2f} ms a slice, batches() {own:.3f} ms, memcpy of the bytes {floor:.3f} ms')
        print(f'five PNGs / ours {peer/own:.1f}   ours / memcpy {own/floor:.1f} (ours also writes four bytes for each one read)')

if __name__ == '__main__': main()
