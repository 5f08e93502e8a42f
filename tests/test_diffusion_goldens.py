"The diffusion model against the official one: network, schedule, one step of each sampler, loss."
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from synthmr.generators.denoiser import Denoiser, from_official, official_names, sinusoids
from synthmr.generators.samplers import alphas_to_sigmas, evenly, linear_alphas, posterior

def official_weights(shared, learned: bool=False) -> dict[str, torch.Tensor]:
    "The official weights by official name."
    weights = load_file(shared/'goldens'/'guided_unet64_weights.safetensors')
    return {k.split('.', 1)[1]: v.float() for letter in ['U'] + ['U_learned'] * learned for k, v in weights.items() if k.startswith(f'{letter}.')}    # U_learned.out.2 comes after U.out.2

@pytest.fixture(params=['fixed', 'learned'])
def official(request, shared):
    "Our network with the official weights, and the golden."
    learned = request.param == 'learned'
    network = Denoiser(outputs=10 if learned else 5, channels=32, multipliers=(1, 1, 2, 2), blocks=1, attention=(4, 8)).eval()
    return from_official(official_weights(shared, learned), network), load_file(shared/'goldens'/f'guided_unet64_{request.param}.safetensors')

@torch.no_grad()
def test_network(official):
    network, golden = official
    assert torch.allclose(network(golden['in.x'], golden['in.t']), golden['out.model'], atol=1e-4)

def test_every_official_weight_has_a_place_of_its_own(shared):
    names = official_names(Denoiser(channels=32, multipliers=(1, 1, 2, 2), blocks=1, attention=(4, 8)))
    assert set(names) == set(official_weights(shared)) and len(set(names.values())) == len(names) > 100

def test_number_of_weights_at_the_papers_size(shared):
    import json
    counts = next(v for k, v in json.loads((shared/'goldens'/'param_counts.json').read_text()).items() if k.startswith('guided_diffusion'))
    for inputs, outputs, key in ((5, 5, 'learn_sigma=False (default), 5 channels'), (3, 6, 'learn_sigma=True, 3 channels')):
        with torch.device('meta'): network = Denoiser(inputs, outputs)
        assert sum(p.numel() for p in network.parameters()) == counts[key]

@pytest.fixture
def schedule(shared): return load_file(shared/'goldens'/'guided_diffusion_schedule4000.safetensors')

def test_schedule_and_its_respacing(schedule):
    alphas = linear_alphas(4000)
    assert np.allclose(alphas, schedule['alphas_cumprod'], rtol=1e-9)
    for picked in (250, 1000):
        assert evenly(4000, picked).tolist() == schedule[f'respaced.{picked}.timestep_map'].tolist()
        sigmas = alphas_to_sigmas(alphas[evenly(4000, picked)])
        betas = schedule[f'respaced.{picked}.betas'].numpy()
        assert np.allclose(1 - (1 + sigmas[:-1]**2) / (1 + sigmas[1:]**2), betas[1:], rtol=1e-9)

def test_posterior(schedule):
    sigmas = alphas_to_sigmas(linear_alphas(4000))
    preserving = np.sqrt(1 + sigmas**2)                 # our state is the official one times this
    for t in (1, 10, 2000, 3999):
        kept, small = posterior(sigmas[t], sigmas[t - 1], 'small')
        assert np.isclose(kept * preserving[t] / preserving[t - 1], schedule['posterior_mean_coef2'][t], rtol=1e-9)
        assert np.isclose((1 - kept) / preserving[t - 1], schedule['posterior_mean_coef1'][t], rtol=1e-6)
        assert np.isclose((small / preserving[t - 1])**2, schedule['posterior_variance'][t], rtol=1e-6)
        large = posterior(sigmas[t], sigmas[t - 1], 'large')[1]
        assert np.isclose((large / preserving[t - 1])**2, schedule['fixed_large_variance'][t], rtol=1e-9)

def test_embedding_of_the_level(schedule):
    for dim in (32, 64): assert torch.allclose(sinusoids(schedule['timestep_embedding.t'], dim), schedule[f'timestep_embedding.dim{dim}'], atol=1e-4)

@pytest.fixture
def diffusion(shared):
    "Our diffusion model with the official weights, and the golden."
    from synthmr.generators.diffusion import Diffusion, DiffusionParams
    params = DiffusionParams(channels=32, multipliers=(1, 1, 2, 2), blocks=1, attention=(16, 8))
    model = Diffusion(params, 64).eval()
    from_official(official_weights(shared), model.network)
    return model, load_file(shared/'goldens'/'guided_unet64_fixed.safetensors')

def each_image(model, golden):
    "Index, step, state in our variables and the factor between theirs and ours, for each image of the golden."
    for i, t in enumerate(golden['in.t'].tolist()):
        sigma = float(model.levels[t])
        yield i, t, golden['in.x'][i:i + 1] * (1 + sigma**2)**0.5, (1 + sigma**2)**0.5

@torch.no_grad()
def test_estimate_of_the_clean_image(diffusion):
    model, golden = diffusion
    for i, t, x, _ in each_image(model, golden):
        sigma = float(model.levels[t])      # the estimate is x - sigma * prediction: rounding of the prediction comes back sigma times
        assert torch.allclose(model.denoise(x, sigma), golden['out.pred_xstart'][i:i + 1], atol=2e-4 + 1e-5 * sigma)

@torch.no_grad()
@pytest.mark.parametrize('sampler, out', [('ancestral', 'out.p_sample'), ('ddim', 'out.ddim_sample')])
def test_one_step_of_the_sampler(diffusion, sampler, out):
    from synthmr.generators.samplers import SAMPLERS
    model, golden = diffusion
    for i, t, x, factor in each_image(model, golden):
        levels = alphas_to_sigmas(linear_alphas(4000))[[t, t - 1]] if t else alphas_to_sigmas(linear_alphas(4000))[[0]]
        seen = []
        def denoise(state, sigma):
            seen.append(state)
            return model.denoise(state, sigma)
        last = SAMPLERS[sampler](denoise, x, levels, lambda step: golden['in.noise'][i:i + 1])
        stepped = seen[1] / (1 + levels[1]**2)**0.5 if t else last      # the state after one step, in their variables
        assert torch.allclose(stepped, golden[out][i:i + 1], atol=2e-4)

@torch.no_grad()
def test_training_loss(diffusion):
    model, golden = diffusion
    error = model.error(golden['in.x0'], model.levels[golden['in.t']], golden['in.noise'])
    assert torch.allclose(error, golden['out.train.mse'], rtol=1e-4)

@torch.no_grad()
def test_respaced_mean(diffusion):
    model, golden = diffusion
    picked = evenly(4000, 250)
    sigmas = alphas_to_sigmas(linear_alphas(4000))[picked]
    for i, s in enumerate(golden['in.t_spaced'].tolist()):
        x = golden['in.x'][i:i + 1] * (1 + sigmas[s]**2)**0.5
        estimate = model.denoise(x, sigmas[s])
        kept = posterior(sigmas[s], sigmas[s - 1])[0] if s else 0.
        mean = (kept * x + (1 - kept) * estimate) / ((1 + sigmas[s - 1]**2)**0.5 if s else 1)
        assert torch.allclose(mean, golden['out.spaced250.p_mean'][i:i + 1], atol=2e-4)

def test_noising(diffusion):
    model, golden = diffusion
    sigma = model.levels[golden['in.t']].view(-1, 1, 1, 1)
    assert torch.allclose((golden['in.x0'] + sigma * golden['in.noise']) / (1 + sigma**2).sqrt(), golden['out.q_sample'], atol=1e-5)

@pytest.fixture
def learned(shared):
    "Our diffusion model that also learns the variance, with the official weights, and the golden."
    from synthmr.generators.diffusion import Diffusion, DiffusionParams
    model = Diffusion(DiffusionParams(channels=32, multipliers=(1, 1, 2, 2), blocks=1, attention=(16, 8), learned_variance=True), 64).eval()
    from_official(official_weights(shared, learned=True), model.network)
    return model, load_file(shared/'goldens'/'guided_unet64_learned.safetensors')

@torch.no_grad()
def test_learned_variance_of_a_step(learned):
    from synthmr.generators.learned_variance import learned_deviation, steps_back
    from synthmr.generators.samplers import ancestral
    model, golden = learned
    levels = alphas_to_sigmas(linear_alphas(4000))
    for i, t, x, _ in each_image(model, golden):
        estimate, v = model.estimate(x, float(model.levels[t]))
        _, small, large = steps_back(levels)[t]
        factor = (1 + levels[t - 1]**2)**0.5 if t else 1
        assert torch.allclose(2 * (learned_deviation(v, small, large) / factor).log(), golden['out.p_log_variance'][i:i + 1], atol=1e-4)
        if t == 0: continue
        seen = []
        def denoise(state, sigma): seen.append(state); return estimate
        ancestral(denoise, x, levels[[t, t - 1]], lambda step: golden['in.noise'][i:i + 1], lambda small, large: learned_deviation(v, small, large))
        assert torch.allclose(seen[1] / factor, golden['out.p_sample'][i:i + 1], atol=2e-4)

@torch.no_grad()
def test_loss_with_a_learned_variance(learned):
    model, golden = learned
    assert torch.allclose(model.error(golden['in.x0'], model.levels[golden['in.t']], golden['in.noise']), golden['out.train.loss'], rtol=2e-3)
    assert (golden['out.train.vb'] > 1e-3 * golden['out.train.mse']).any()       # the bound counts in the golden
