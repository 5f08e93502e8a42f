"""3D metrics of three tumour classes in a full-size volume, one thread: ours against MONAI's and against whole-volume distance transforms.

    python tests/bench/bench_overlap.py

Times are processor seconds, the best of several rounds in which the contestants take turns, so other work on the machine disturbs the ratios little.
"""
import os
os.environ.update({k: '1' for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')})     # before numpy is loaded
import platform
import time
import warnings

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter

warnings.filterwarnings('ignore', category=FutureWarning, module='monai')
from monai import __version__ as monai_version
from monai.metrics import compute_dice, compute_hausdorff_distance

from synthmr.metrics.overlap import evaluate_volume, hausdorff, surface

SHAPE, CLASSES = (155, 240, 240), (1, 2, 3)

def wave(seed: int) -> np.ndarray:
    "Smooth noise of a few millimetres, float32."
    return gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32), 5) * 200

def tumour(shift: float=0, waves: tuple=((0, 1.0),)) -> np.ndarray:
    "Class indices of a simulated tumour of realistic size: core 16 mm, rim 4 mm, oedema 15 mm, wavy."
    z, y, x = np.ogrid[:155, :240, :240]
    distance = np.sqrt((z - 80.)**2 + (y - 120.)**2 + (x - 150. - shift)**2) + sum(weight * wave(seed) for seed, weight in waves)
    return np.select([distance < 16, distance < 20, distance < 35], [1, 3, 2], 0).astype(np.uint8)

def cases() -> dict[str, np.ndarray]:
    "Segmentations of the tumour, by kind of error."
    good, poor = tumour(0, ((0, 1), (5, 0.15))), tumour(2, ((0, 1), (6, 0.6)))
    stray = good.copy()
    for c, corner in zip(CLASSES, ((60, 60, 60), (40, 70, 50), (100, 50, 70))): stray[tuple(slice(s, s + 3) for s in corner)] = c
    return {'shifted by 3 voxels': tumour(3), 'good': good, 'poor': poor, 'good, with stray islands': stray}

def by_transforms(a: np.ndarray, b: np.ndarray) -> float:
    "Hausdorff distance by two distance transforms of the whole volume."
    edges = []
    for mask in (a, b):
        edge = np.zeros(SHAPE, bool); edge[tuple(surface(mask).T)] = True; edges.append(edge)
    return max(distance_transform_edt(~edges[0])[edges[1]].max(), distance_transform_edt(~edges[1])[edges[0]].max())

def race(contestants: dict, rounds: int) -> tuple[dict, dict]:
    "Best processor seconds and last result of each function; they take turns."
    best, result = dict.fromkeys(contestants, np.inf), {}
    for _ in range(rounds):
        for name, f in contestants.items():
            began = time.process_time(); result[name] = f(); best[name] = min(best[name], time.process_time() - began)
    return best, result

def main():
    torch.set_num_threads(1)
    print(f'{SHAPE}, {len(CLASSES)} classes, 1 thread, {platform.machine()}, {os.cpu_count()} cores; MONAI {monai_version}')
    true, ratios, differences = tumour(), [], []
    for name, pred in cases().items():
        one, two = (torch.stack([torch.from_numpy(v == c) for c in CLASSES])[None].float() for v in (true, pred))   # MONAI gets its masks for nothing
        seconds, values = race({'ours': lambda: [hausdorff(true == c, pred == c) for c in CLASSES],
                                'monai': lambda: compute_hausdorff_distance(two, one, include_background=True)[0].tolist(),
                                'volume': lambda: evaluate_volume(true, pred),
                                'monai both': lambda: (compute_dice(two, one), compute_hausdorff_distance(two, one, include_background=True)),
                                'floor': lambda: [(np.count_nonzero(true == c), np.count_nonzero(pred == c)) for c in CLASSES]}, 5)
        whole, transformed = race({'edt': lambda: [by_transforms(true == c, pred == c) for c in CLASSES]}, 1)
        ratios.append(seconds['monai'] / seconds['ours'])
        differences.append([np.abs(np.subtract(values['ours'], other)).max() for other in (values['monai'], transformed['edt'])])
        print(f"\n{name}: Dice {', '.join(f'{d:.2f}' for d in values['volume'].dice)}; Hausdorff {', '.join(f'{v:.1f}' for v in values['ours'])} mm; ours {1000 * seconds['ours']:.0f} ms")
        print(f"  Hausdorff: MONAI / ours                            {ratios[-1]:6.1f}")
        print(f"  Hausdorff: whole-volume transforms / ours          {whole['edt'] / seconds['ours']:6.1f}")
        print(f"  Hausdorff: ours / counting the voxels of the masks {seconds['ours'] / seconds['floor']:6.1f}")
        print(f"  Dice and Hausdorff: MONAI / evaluate_volume        {seconds['monai both'] / seconds['volume']:6.1f}")
    to_monai, to_transforms = np.max(differences, axis=0)
    print(f'\nMONAI / ours from {min(ratios):.1f} to {max(ratios):.1f}; largest difference to MONAI {to_monai:.1g} mm (it rounds to float32), to the transforms {to_transforms:.1g} mm')

if __name__ == '__main__': main()
