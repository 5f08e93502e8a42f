"""A full training iteration of StyleGAN 2 and StyleGAN 3: ours, with resampling as matrix products and one convolution for all images, against the plain formulation
(zeros inserted, padding, depthwise convolutions, weights of each image's own). Then images sampled a second.

    python tests/bench/bench_generators.py [--rounds 5] [--resolution 64] [--batch 8] [--threads 1]

An iteration is the generator's and the discriminator's phase, and the share of R1 (a 16th) and path length (a quarter). Times are processor seconds; of each phase the best of several rounds in which the contestants take turns, so
that other work on the machine disturbs the ratios little.
"""
import argparse
import copy
import math
import os
import platform
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthmr.generators import stylegan2
from synthmr.generators.layers import SQRT2, lrelu
from synthmr.generators.resampling import Resample
from synthmr.generators.stylegan2 import StyleGAN2, StyleGAN2Params
from synthmr.generators.stylegan3 import StyleGAN3, StyleGAN3Params, SynthesisLayer
from synthmr.training import TrainingParams

def own_weights(x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool=True, gain: Tensor|float=1., padding: int|None=None, up: bool=False) -> Tensor:
    "`modulated_conv2d` with weights of each image's own: a grouped convolution with one group for each image (Karras et al. 2020, appendix B)."
    b, c, h, w = x.shape
    own = weight * styles[:, None, :, None, None]
    if demodulate: own = own * (own.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    own, x = own * gain, x.reshape(1, b * c, h, w)
    if up: x = F.conv_transpose2d(x, own.transpose(1, 2).flatten(0, 1), stride=2, groups=b)
    else: x = F.conv2d(x, own.flatten(0, 1), padding=weight.shape[-1] // 2 if padding is None else padding, groups=b)
    return x.unflatten(1, (b, -1))[0]

def raised(x: Tensor, up: int, padding: tuple[int, int]) -> Tensor:
    "Zeros between the samples, then around them."
    b, c, h, w = x.shape
    return F.pad(F.pad(x[..., None, :, None], (0, up - 1, 0, 0, 0, up - 1)).reshape(b, c, h * up, w * up), padding * 2)

class PlainResample(nn.Module):
    "`Resample` as a padded depthwise convolution."
    def __init__(self, ours: Resample):
        super().__init__()
        self.taps, self.up, self.down, self.padding = ours.taps * ours.up, ours.up, ours.down, ours.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(raised(x, self.up, self.padding), self.taps.outer(self.taps).to(x.dtype).expand(x.shape[1], 1, -1, -1), stride=self.down, groups=x.shape[1])

class PlainLayer(nn.Module):
    "The same layer as it is written in the papers: weights of each image's own, zeros between the samples, filters as depthwise convolutions."
    def __init__(self, layer: SynthesisLayer):
        super().__init__()
        self.weight, self.bias, self.affine, self.magnitude, self.plan, self.decay, self.clamp = layer.weight, layer.bias, layer.affine, layer.magnitude, layer.plan, layer.decay, layer.clamp
        if not self.plan.to_image: self.up_taps, self.down_taps = self.plan.filters()

    def convolve(self, x: Tensor, styles: Tensor) -> Tensor:
        if self.plan.to_image: return own_weights(x, self.weight, styles / math.sqrt(self.weight[0].numel()), False, self.magnitude.rsqrt(), self.plan.kernel - 1)
        return own_weights(x, self.weight * self.weight.square().mean((1, 2, 3), keepdim=True).rsqrt(), styles * styles.square().mean().rsqrt(), True, self.magnitude.rsqrt(), self.plan.kernel - 1)

    def filter(self, x: Tensor, taps: Tensor, stride: int=1) -> Tensor:
        "Separable filters as two convolutions, others as one."
        c = x.shape[1]
        if taps.ndim == 2: return F.conv2d(x, taps.expand(c, 1, -1, -1), stride=stride, groups=c)
        x = F.conv2d(x, taps[None].expand(c, 1, 1, -1), stride=(1, stride), groups=c)
        return F.conv2d(x, taps[:, None].expand(c, 1, -1, -1), stride=(stride, 1), groups=c)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            if self.training: self.magnitude.lerp_(x.square().mean(), 1 - self.decay)
        x = self.convolve(x, self.affine(w)) + self.bias[:, None, None]
        if self.plan.to_image: return x.clamp(-self.clamp, self.clamp)
        x = self.filter(raised(x, self.plan.up, self.plan.padding), self.up_taps * self.plan.up)
        return self.filter((lrelu(x) * SQRT2).clamp(-self.clamp, self.clamp), self.down_taps, self.plan.down)

@contextmanager
def plain(model):
    "A copy of a model in the plain formulation."
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Resample): setattr(module, name, PlainResample(child))
            if isinstance(child, SynthesisLayer): module[int(name)] = PlainLayer(child)
    model.discriminator.from_image.register_forward_pre_hook(lambda module, x: x[0].contiguous())   # the usual memory format
    ours, stylegan2.modulated_conv2d = stylegan2.modulated_conv2d, own_weights
    try: yield model
    finally: stylegan2.modulated_conv2d = ours

def seconds(model, batch: Tensor, bf16: bool) -> dict[str, float]:
    "Processor seconds of each phase, in its share of an iteration."
    found = {}
    for phase in model.phases():
        model.requires_grad_(False); phase.module.requires_grad_(True)
        torch.manual_seed(0)
        began = time.process_time()
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss, _ = phase.loss(batch, 0)
        loss.backward(); phase.optimizer.step()
        found[phase.name] = (time.process_time() - began) / phase.every
        for p in model.parameters(): p.grad = None
    return found

def images(model, n: int) -> Tensor:
    "The same random images in any formulation."
    torch.manual_seed(1)
    with torch.no_grad(): return model.paint(n)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {'rounds': 5, 'resolution': 64, 'batch': 8, 'base': 4096, 'max': 64, 'threads': 1}.items(): parser.add_argument(f'--{name}', type=int, default=value)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(f'{a.resolution}x{a.resolution}, 5 channels, batch {a.batch}, channel_base {a.base}, channel_max {a.max}, {a.threads} thread(s), {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}')
    common = dict(channel_base=a.base, channel_max=a.max, training=TrainingParams(kimg=1, batch_size=a.batch))
    for title, family, params in (('StyleGAN 2', StyleGAN2, StyleGAN2Params(**common)), ('StyleGAN 3, configuration T', StyleGAN3, StyleGAN3Params(**common)),
                                  ('StyleGAN 3, configuration R', StyleGAN3, StyleGAN3Params(**common, rotation=True))):
        torch.manual_seed(0)
        ours, batch, rounds = family(params, a.resolution), torch.randn(a.batch, 5, a.resolution, a.resolution), {'plain': [], 'fp32': [], 'bf16': []}
        with plain(ours) as theirs: reference = images(theirs, a.batch)
        difference = ((images(ours, a.batch) - reference).abs().max() / reference.std()).item()
        for _ in range(a.rounds):
            with plain(ours) as theirs: rounds['plain'].append(seconds(theirs, batch, False))
            for name in ('fp32', 'bf16'): rounds[name].append(seconds(ours, batch, name == 'bf16'))
        best = {name: sum(min(phase) for phase in zip(*(r.values() for r in found))) for name, found in rounds.items()}
        began = time.perf_counter()
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): ours.eval().sample(torch.randn(64, params.latents))
        rate = 64 / (time.perf_counter() - began)
        print(f"\n{title}: images differ by {difference:.1g} of their standard deviation; plain fp32 {1000 * best['plain']:.0f} ms an iteration; {rate:.0f} images sampled a second with bf16")
        print(f"  plain fp32 / ours fp32 {best['plain'] / best['fp32']:6.1f}\n  plain fp32 / ours bf16 {best['plain'] / best['bf16']:6.1f}")

if __name__ == '__main__': main()
