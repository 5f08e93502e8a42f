"""Preparation: the plain procedure / ours, ours / decompression alone (one subject of five .nii.gz, one core); memory against the number of subjects; threads.

Uses ../shared/real where it is there, else a simulated subject of full size. Prints ratios of one run; times vary with the machine, ratios less so.
"""
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from synthmr.data.nifti import _Stream, find_subjects
from synthmr.data.prepare import PrepareParams, prepare
from synthmr.data.protocol import prepare_subject
from synthmr.data.simulated import SimulatedParams, simulate_cohort
from synthmr.slices import CHANNELS

REAL = Path(__file__).resolve().parents[3]/'shared'/'real'

def plain(subject):
    "The protocol as one would write it with nibabel and float64."
    volumes = [nib.load(subject.files[c]).get_fdata() for c in CHANNELS]
    images = [v / v.max() * 255 for v in volumes[:4]] + [volumes[4] * 51]
    images = np.stack([np.pad(i, ((8, 8), (8, 8), (0, 0))) for i in images])
    keep = (images[0] > 50).mean(axis=(0, 1)) > 0.15
    return np.floor(images[..., keep].clip(0) + 0.5).astype(np.uint8).transpose(3, 0, 2, 1)

def decompress(subject):
    "All bytes of the subject's files, and nothing else."
    for c in CHANNELS:
        with _Stream(subject.files[c]) as stream:
            while stream.piece(1 << 20): pass

def cohort(source: Path, folder: Path, n: int) -> Path:
    "`n` subjects that are links to those of `source`."
    subjects = list(find_subjects(source).values())
    folder.mkdir()
    for i in range(n):
        s = subjects[i % len(subjects)]
        for path in s.files.values(): (folder/path.name.replace(s.name, f'P{i:03d}')).symlink_to(path.resolve())
    return folder

def measure(nifti: str, store: str, workers: str):
    "In a process of its own: megabytes at most and seconds."
    start = time.perf_counter()
    prepare(PrepareParams(nifti=nifti, workers=int(workers)), store, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter() - start)

def run(*args) -> tuple[float, float]:
    return tuple(map(float, subprocess.run([sys.executable, __file__, 'measure', *map(str, args)], check=True, capture_output=True, text=True).stdout.split()[-2:]))

def main(rounds: int=7):
    with tempfile.TemporaryDirectory() as folder:
        folder, source = Path(folder), REAL
        if not REAL.is_dir(): source = folder/'simulated'; simulate_cohort(source, SimulatedParams(subjects=2, workers=0))
        subject = next(iter(find_subjects(source).values()))
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})
        times = {f: [] for f in (plain, prepare_subject, decompress)}
        assert (plain(subject) == prepare_subject(subject)[0]).all()
        for _ in range(rounds):
            for f in times: start = time.perf_counter(); f(subject); times[f].append(time.perf_counter() - start)
        peer, ours, floor = (statistics.median(t) for t in times.values())
        os.sched_setaffinity(0, cores)
        print(f'{subject.name} ({"real" if source == REAL else "SIMULATED"}), 240x240x155 x 5, identical images; median of {rounds}, 1 of {len(cores)} cores, {platform.processor() or platform.machine()}')
        print(f'plain {1000*peer:.0f} ms, ours {1000*ours:.0f} ms, decompression alone {1000*floor:.0f} ms')
        print(f'plain / ours {peer/ours:.2f} (target: at least 4)   ours / decompression {ours/floor:.2f} (target: at most 2.5)')
        (small, _), (large, _) = (run(cohort(source, folder/f'n{n}', n), folder/f'store{n}', 2) for n in (4, 16))
        print(f'memory at most, 2 threads: 4 subjects {small:.0f} MB, 16 subjects {large:.0f} MB; 16 / 4 {large/small:.2f} (flat is 1)')
        (_, one), (_, two) = (run(folder/'n16', folder/f'workers{w}', w) for w in (0, 2))
        print(f'16 subjects with the store on disk: this thread {one:.2f} s, 2 threads {two:.2f} s; 1 / 2 {one/two:.2f}')

if __name__ == '__main__': measure(*sys.argv[2:]) if sys.argv[1:2] == ['measure'] else main()
