"""Fréchet distance of 2048 features, one thread: ours against scipy's square root of a matrix, for regular and for singular covariances.

    python tests/bench/bench_frechet.py [dimensions]

Times are processor seconds, the best of the rounds in which the contestants take turns (the peer runs once).
"""
import os
os.environ.update({k: '1' for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')})     # before numpy is loaded
import platform
import sys
import time

import numpy as np
import scipy
from scipy.linalg import eigvalsh, sqrtm

from synthmr.metrics.frechet import Moments, frechet_distance, mean_and_covariance

def features(n: int, d: int, seed: int) -> np.ndarray:
    "Positive features with a spectrum that falls, as those of a network."
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(size=(n, d)) * np.arange(1, d + 1)**-0.5 @ rng.normal(size=(d, d)) / 4 + 0.3 + 0.05*seed, 0)

def by_sqrtm(m1, c1, m2, c2) -> float:
    "As the published implementations compute it."
    return float(((m1 - m2)**2).sum() + np.trace(c1) + np.trace(c2) - 2*np.trace(sqrtm(c1 @ c2).real))

def seconds(f, rounds: int) -> tuple[float, float]:
    "Best processor seconds, and the value."
    best = np.inf
    for _ in range(rounds): began = time.process_time(); value = f(); best = min(best, time.process_time() - began)
    return best, value

def main():
    d = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    print(f'{d} features, 1 thread, {platform.machine()}, {os.cpu_count()} cores; scipy {scipy.__version__}')
    for name, n in (('regular, n = 2 d', 2*d), ('singular, n = d / 4', d // 4)):
        moments = [m for seed in (0, 1) for m in mean_and_covariance(Moments().add(features(n, d, seed)))]
        ours, value = seconds(lambda: frechet_distance(*moments), 3)
        floor, _ = seconds(lambda: eigvalsh(moments[1], check_finite=False), 1)
        peer, expected = seconds(lambda: by_sqrtm(*moments), 1)
        print(f'\n{name}: {value:.6f}; ours {ours:.2f} s')
        print(f'  sqrtm / ours                        {peer / ours:6.1f}   relative difference {abs(value - expected) / expected:.1g}')
        print(f'  ours / eigenvalues of one matrix    {ours / floor:6.1f}')

if __name__ == '__main__': main()
