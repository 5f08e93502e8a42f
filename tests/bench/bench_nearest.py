"""Nearest training images of 256 x 256 x 5 values, one thread: against reading the bytes once, and against the peak of matrix products of the same type.

    python tests/bench/bench_nearest.py [TRAINING IMAGES]

Times are processor seconds, all taken in one run, so what else the machine does disturbs the ratios little. The images are simulated.
"""
import os
os.environ.update({k: '1' for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')})     # before numpy is loaded
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from synthmr.data.prepare import example_store
from synthmr.metrics.bounds import nearest_bounded, summarise
from synthmr.metrics.nearest import image_sums, nearest

SIZE, QUERIES = 256, 2000

def images(path: Path, n: int, seed: int) -> np.ndarray:
    "A memory map of n images: simulated slices of 64 pixels, enlarged, moved, under another gain, with noise."
    source, rng = example_store(resolution=64)[:], np.random.default_rng(seed)
    noise = rng.normal(0, 5, (8, 5, SIZE, SIZE)).astype(np.float32); noise[:, 4] = 0
    out = np.lib.format.open_memmap(path, 'w+', np.uint8, (n, 5, SIZE, SIZE))
    for i in range(n):
        grey = np.roll(source[rng.integers(len(source))], rng.integers(-3, 4, 2), (1, 2)).repeat(4, 1).repeat(4, 2).astype(np.float32)
        grey[:4] *= rng.uniform(0.7, 1.1, (4, 1, 1)).astype(np.float32)
        out[i] = np.clip(grey + noise[i % 8] * (grey > 0), 0, 255)
    return out

def seconds(f, rounds: int=2) -> float:
    best = np.inf
    for _ in range(rounds): began = time.process_time(); f(); best = min(best, time.process_time() - began)
    return best

def peak(precision: str, n: int=2048) -> float:
    "Operations a second in a square product."
    if precision == 'int8': a = torch.randint(-128, 128, (n, n), dtype=torch.int8); return 2 * n**3 / seconds(lambda: torch._int_mm(a, a.T), 5)
    a = torch.randn((n, n)).to({'fp32': torch.float32, 'bf16': torch.bfloat16}[precision])
    return 2 * n**3 / seconds(lambda: a @ a, 5)

def read_once(training: np.ndarray):
    "The floor: every byte is copied once."
    buffer = np.empty((64, *training.shape[1:]), np.uint8)
    for i in range(0, len(training), 64): np.copyto(buffer[:len(training) - i], training[i:i + 64])

def main(n: int=4000):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        training, queries = images(Path(folder)/'training.npy', n, 0), images(Path(folder)/'queries.npy', QUERIES, 1)
        size = training[0].size
        print(f'{n} training images of {size} bytes, {training.nbytes / 1e9:.2f} GB in the page cache; 1 thread, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}')
        began = time.process_time(); sums = image_sums(training)
        floor = seconds(lambda: read_once(training))
        print(f'reading once {floor:.2f} s ({training.nbytes / floor / 1e9:.1f} GB/s); sums, needed once: {(time.process_time() - began - 2 * floor) / floor:.1f} readings')
        for name, views in (('whole image', {'whole': range(5)}), ('whole image and four sequences', None)):
            kw = dict(sums=sums, progress=False, **({'views': views} if views else {}))
            took = seconds(lambda: nearest(queries[:100], training, **kw))
            print(f'100 queries, int8, {name}: {took:.2f} s, ours / reading once {took / floor:.1f}; {2e2 * n * size / took / 1e9:.0f} GFLOP/s, {2e2 * n * size / took / peak("int8"):.2f} of the peak')
        few, all_pairs = training[:n // 4], {}
        for precision in ('int8', 'bf16', 'fp32'):
            part, q = (training, queries) if precision == 'int8' else (few, queries if precision == 'bf16' else queries[:1000])
            best, took = peak(precision), seconds(lambda: nearest(q, part, {'whole': range(5)}, precision=precision, memory=4 * 2**30, progress=False), 1)
            all_pairs[precision] = took
            rate, best = 2 * len(q) * len(part) * size / took, max(best, peak(precision))
            print(f'{len(q)} queries x {len(part)}, {precision}: {took:.1f} s, {rate / 1e9:.0f} of {best / 1e9:.0f} GFLOP/s, {rate / best:.2f} of the peak')
        whole, began = {'whole': range(5)}, time.process_time()
        known = summarise(training, 8)
        print(f'summary, needed once: {time.process_time() - began:.1f} s, {2 * known.means.nbytes / training.nbytes:.2f} of the bytes')
        for name, n_queries, at_least in (('nearest', 100, -1), ('nearest', QUERIES, -1), ('0.97 or above', 100, 0.97), ('0.97 or above', QUERIES, 0.97)):
            began = time.process_time(); found = nearest_bounded(queries[:n_queries], training, known, whole, at_least=at_least, memory=4 * 2**30, progress=False); took = time.process_time() - began
            print(f"bounds, {n_queries} queries, {name}: {took:.1f} s, {found.attrs['exact'] / found.attrs['pairs']:.2%} of the pairs multiplied, all pairs / bounds {all_pairs['int8'] * n_queries / QUERIES / took:.1f}, ours / reading once {took / floor:.1f}")

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
