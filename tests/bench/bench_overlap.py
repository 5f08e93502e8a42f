"""Hausdorff distance of three tumour classes in a full-size volume, one thread: ours against MONAI's and against whole-volume distance transforms.

    python tests/bench/bench_overlap.py
"""
import time

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from scipy.ndimage import distance_transform_edt, gaussian_filter

from synthmr.metrics.overlap import hausdorff, surface

SHAPE = (155, 240, 240)

def tumour(shift: int) -> np.ndarray:
    "Class indices of a tumour of realistic size: core 20 mm, rim 4 mm, oedema 15 mm, wavy."
    rng = np.random.default_rng(0)
    wave = gaussian_filter(rng.normal(size=SHAPE).astype(np.float32), 5) * 200
    z, y, x = np.ogrid[:155, :240, :240]
    distance = np.sqrt((z - 80.)**2 + (y - 120.)**2 + (x - 150. - shift)**2) + wave
    return np.select([distance < 16, distance < 20, distance < 35], [1, 3, 2], 0).astype(np.uint8)

def by_transforms(a: np.ndarray, b: np.ndarray) -> float:
    "Hausdorff distance by two distance transforms of the whole volume."
    edges = []
    for mask in (a, b):
        edge = np.zeros(SHAPE, bool); edge[tuple(surface(mask).T)] = True; edges.append(edge)
    return max(distance_transform_edt(~edges[0])[edges[1]].max(), distance_transform_edt(~edges[1])[edges[0]].max())

def seconds(f, repeat: int) -> tuple[float, list[float]]:
    "Best time of `repeat` calls, and the values."
    times = []
    for _ in range(repeat):
        began = time.perf_counter(); values = f(); times.append(time.perf_counter() - began)
    return min(times), values

def main():
    torch.set_num_threads(1)
    a, b = tumour(0), tumour(3)
    one_hot = [torch.stack([torch.from_numpy(v == c) for c in (1, 2, 3)])[None].float() for v in (a, b)]
    ours, values = seconds(lambda: [hausdorff(a == c, b == c) for c in (1, 2, 3)], 5)
    monai, reference = seconds(lambda: compute_hausdorff_distance(one_hot[1], one_hot[0], include_background=True)[0].tolist(), 2)
    whole, transformed = seconds(lambda: [by_transforms(a == c, b == c) for c in (1, 2, 3)], 1)
    floor, _ = seconds(lambda: [(np.count_nonzero(a == c), np.count_nonzero(b == c)) for c in (1, 2, 3)], 5)
    print(f'Hausdorff, three classes, {SHAPE}, one thread: {ours:.2f} s')
    print(f'  MONAI / ours                      {monai / ours:6.1f}')
    print(f'  whole-volume transforms / ours    {whole / ours:6.1f}')
    print(f'  ours / reading the masks once     {ours / floor:6.1f}')
    print(f'  largest difference to MONAI       {max(abs(v - r) for v, r in zip(values, reference)):6.1g} mm, to the transforms {max(abs(v - r) for v, r in zip(values, transformed)):.1g} mm')

if __name__ == '__main__': main()
