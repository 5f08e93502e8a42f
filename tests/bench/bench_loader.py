"""Batches of 256x256x5 from the slice store, against five PNGs a slice and against copying the bytes.

    python tests/bench/bench_loader.py
"""
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from synthmr.data.simulated import SimulatedParams, simulate_cohort
from synthmr.data.prepare import PrepareParams, prepare
from synthmr.batches import batches
from synthmr.slices import to_float

BATCH, COUNT = 16, 12

def seconds(f, repeat: int=3) -> float:
    "Best time of `repeat` calls."
    times = []
    for _ in range(repeat):
        began = time.perf_counter(); f(); times.append(time.perf_counter() - began)
    return min(times)

def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        simulate_cohort(place/'cohort', SimulatedParams(subjects=2, workers=2), progress=False)
        store = prepare(PrepareParams(nifti=str(place/'cohort')), place/'store', progress=False)
        for i in range(len(store)):
            for c, channel in enumerate(store[i]): Image.fromarray(channel).save(place/f'{i}-{c}.png')
        order = np.random.default_rng(0).integers(0, len(store), (COUNT, BATCH))

        def pngs(): # the authors' layout
            for batch in order: to_float(torch.from_numpy(np.stack([np.stack([np.asarray(Image.open(place/f'{i}-{c}.png')) for c in range(5)]) for i in batch])))
        def ours(workers): # the first batch waits for the workers to start, so it is dealt before the clock runs
            stream = batches([store], BATCH, 0, workers=workers); next(stream)
            return seconds(lambda: list(islice(stream, COUNT)))
        out, images = np.empty((BATCH, *store.images.shape[1:]), np.uint8), np.ascontiguousarray(store.images[:BATCH])
        floor = seconds(lambda: [np.copyto(out, images) for _ in range(COUNT)])
        peer, here, two = seconds(pngs, 2), ours(0), ours(2)
    n = BATCH * COUNT
    print(f'{n} slices of 5x256x256 as float32, batches of {BATCH}, one thread: {1000 * here / n:.2f} ms a slice')
    print(f'  five PNGs a slice / ours            {peer / here:6.1f}')
    print(f'  ours / ours with two workers        {here / two:6.1f}')
    print(f'  ours / copying the bytes            {here / floor:6.1f}')

if __name__ == '__main__': main()
