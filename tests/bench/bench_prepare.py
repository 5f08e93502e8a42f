"""Preparation of one subject on one core, against decompression alone and the plain nibabel float64 procedure; memory against the number of subjects.

    python tests/bench/bench_prepare.py

Uses a patient of ../shared/real where that is there, else a simulated subject of full size.
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip

from synthmr.data.nifti import find_subjects
from synthmr.data.prepare import prepare_subject
from synthmr.data.simulated import SimulatedParams, simulate_cohort

REAL = Path(__file__).resolve().parents[3]/'shared'/'real'

def plainly(files) -> list[np.ndarray]:
    "The protocol with nibabel's float64, the peer."
    images = {}
    for channel, path in files.items():
        volume = nib.load(path).get_fdata()
        images[channel] = np.pad(volume * 51 if channel == 'annotation' else volume / volume.max() * 255, ((8, 8), (8, 8), (0, 0)))
    kept = [z for z in range(volume.shape[2]) if (images['T1w'][..., z] > 50).sum() > 0.15 * 256 * 256]
    return [np.clip(np.floor(images[c][..., z].T + 0.5), 0, 255).astype(np.uint8) for z in kept for c in images]

def seconds(f, repeat: int=5) -> float:
    "Best time of `repeat` calls."
    times = []
    for _ in range(repeat):
        began = time.perf_counter(); f(); times.append(time.perf_counter() - began)
    return min(times)

MEMORY = """
import resource, sys
from synthmr.data.prepare import PrepareParams, prepare
prepare(PrepareParams(nifti=sys.argv[1], workers=0), sys.argv[2], progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

def peak_memory(folder: Path, subjects: int) -> float:
    "Largest resident memory in MiB of preparing so many copies of a subject, in a process of its own."
    name, subject = next(iter(find_subjects(folder).items()))
    with tempfile.TemporaryDirectory() as place:
        cohort = Path(place)/'cohort'
        for i in range(subjects):
            for path in subject.files.values():
                target = cohort/f'S{i:03d}'/path.name.replace(name, f'S{i:03d}')
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path.resolve())
        return float(subprocess.run([sys.executable, '-c', MEMORY, cohort, Path(place)/'store'], check=True, capture_output=True, text=True).stdout)

def main():
    with tempfile.TemporaryDirectory() as place:
        folder = REAL
        if not REAL.is_dir(): simulate_cohort(folder := Path(place)/'cohort', SimulatedParams(subjects=1, workers=0))
        subject = next(iter(find_subjects(folder).values()))
        bytes_ = [p.read_bytes() for p in subject.files.values()]
        ours, plain = seconds(lambda: prepare_subject(subject, 256)), seconds(lambda: plainly(subject.files), 2)
        floor = seconds(lambda: [igzip.decompress(b) for b in bytes_])
        few, many = peak_memory(folder, 2), peak_memory(folder, 12)
    print(f'{subject.name}, five volumes of 240x240x155, one core: {1000 * ours:.0f} ms')
    print(f'  plain nibabel float64 / ours       {plain / ours:5.1f}')
    print(f'  ours / decompression alone (igzip) {ours / floor:5.1f}')
    print(f'  peak memory of 12 subjects / of 2  {many / few:5.2f}   ({many:.0f} and {few:.0f} MiB)')

if __name__ == '__main__': main()
