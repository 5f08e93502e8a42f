"Images of the diffusion model: by number, whatever the batch; every sampler; parameters that cannot be."
import numpy as np
import pytest
import torch
from torch import nn

from synthmr.generators.diffusion import Diffusion, DiffusionParams
from synthmr.params import ParamsError, check
from synthmr.slices import to_uint8
from synthmr.training import TrainingParams

SMALL = dict(channels=16, multipliers=(1, 2), blocks=1, attention=(8,), sampling_steps=6)
FAST = SMALL | dict(process='edm', patch=2, coordinates=True, gated=True, annotation='one_hot', sampler='dpm_solver')

def untrained(precision='fp32', **settings) -> Diffusion:
    "A model whose zero-initialised layers are not zero."
    torch.manual_seed(0)
    model = Diffusion(DiffusionParams(**settings, training=TrainingParams(kimg=1, batch_size=4, precision=precision)), 16).eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv1d)) and not module.weight.any(): nn.init.normal_(module.weight, std=0.05)
    return model

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('settings', [SMALL, SMALL | {'sampler': 'ddim'}, FAST], ids=['ancestral', 'ddim', 'fast'])
def test_an_image_depends_on_seed_and_number_alone(settings, precision):
    model = untrained(precision, **settings)
    whole = to_uint8(model.generate(3, range(8)))
    assert len(np.unique(whole.reshape(8, -1), axis=0)) == 8
    for size in (1, 3):
        parts = np.concatenate([to_uint8(model.generate(3, range(i, min(8, i + size)))) for i in range(0, 8, size)])
        assert np.array_equal(parts, whole)
    assert not np.array_equal(to_uint8(model.generate(4, range(8))), whole)

def test_parameters_that_cannot_be_are_refused():
    for wrong, key in (({'sampler': 'euler'}, 'sampler'), ({'channels': 0}, 'channels'), ({'training': {'kimg': 1, 'batch_size': 4, 'accumulate': 3}}, 'training')):
        with pytest.raises(ParamsError, match=key): check(DiffusionParams, wrong)
