"""Reading the weights of published models without executing them: our interpreter against the unpicklers of torch and of Python, at the paper's size.

    python tests/bench/bench_pickles.py

Processor seconds, one thread, the best of three rounds in which the contestants take turns. The floor is reading the bytes and computing their SHA-256, which `synthmr import-checkpoint` does besides.
"""
import hashlib
import pickle
import tempfile
import time
from pathlib import Path

import torch

from synthmr.generators.denoiser import Denoiser
from synthmr.generators.stylegan2 import StyleGAN2Generator
from synthmr.weights import View, read_checkpoint

def numbers(content):
    "All tensors, really read."
    return {name: value.tensor() if isinstance(value, View) else value.float().clone() for name, value in content.items()}

def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for what, network in (('diffusion, torch.save', Denoiser()), ('StyleGAN 2, pickle', StyleGAN2Generator(256))):
            path, state = Path(folder)/'model', dict(network.state_dict())
            if 'pickle' in what: path.write_bytes(pickle.dumps(state))
            else: torch.save(state, path)
            peer = (lambda: pickle.loads(path.read_bytes())) if 'pickle' in what else (lambda: torch.load(path, weights_only=True))
            contestants = {'ours': lambda: numbers(read_checkpoint(path)[0]), 'peer, which executes or is told what not to': lambda: numbers(peer()), 'floor: bytes and SHA-256': lambda: hashlib.sha256(path.read_bytes())}
            best = dict.fromkeys(contestants, float('inf'))
            for _ in range(3):
                for name, run in contestants.items():
                    began = time.process_time(); run(); best[name] = min(best[name], time.process_time() - began)
            size = path.stat().st_size / 1e6
            print(f"{what}, {size:.0f} MB, {len(state)} tensors: " + ', '.join(f'{name} {s:.2f} s' for name, s in best.items()) + f"; peer / ours {best['peer, which executes or is told what not to'] / best['ours']:.2f}, ours / floor {best['ours'] / best['floor: bytes and SHA-256']:.2f}")

if __name__ == '__main__': main()
