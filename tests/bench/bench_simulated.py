"""Seconds to simulate a subject, one thread, and what of that no implementation could save.

    python tests/bench/bench_simulated.py
"""
import time

import torch
import torch.nn.functional as F

from synthmr.data.simulated import SimulatedParams, grid_axes, in_head, simulate_subject, template

def seconds(f, repeat: int) -> float:
    "Best time of `repeat` calls."
    times = []
    for i in range(repeat):
        began = time.perf_counter(); f(i); times.append(time.perf_counter() - began)
    return min(times)

def main():
    torch.set_num_threads(1)
    template()
    axes = grid_axes(1)
    voxels = len(in_head(axes))
    at = torch.rand(1, 1, 1, voxels, 3) * 2 - 1
    floor = seconds(lambda i: (F.grid_sample(template()[None], at, align_corners=True), torch.randn(8, voxels)), 3)
    times = {mm: seconds(lambda i: simulate_subject(i, SimulatedParams(spacing=mm)), n) for mm, n in ((1, 3), (2, 4), (4, 6))}
    print('one subject, one thread: ' + ', '.join(f'{mm} mm {t:.2f} s' for mm, t in times.items()))
    print(f'  full size / looking up the template and drawing the noise once   {times[1] / floor:5.1f}')
    print(f'  full size / 4 mm, per voxel                                      {times[1] / times[4] / 64:5.2f}')

if __name__ == '__main__': main()
