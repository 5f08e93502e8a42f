"A study so small that it ends in minutes: six simulated subjects, slices of 16x16, networks of a few features. What it finds means nothing."
DATA = {'dataset': 'tiny', 'simulated': {'subjects': 6, 'seed': 3, 'spacing': 4}, 'resolution': 16, 'test_share': 0.34}
_STYLE = {'latents': 8, 'width': 8, 'mapping_layers': 1, 'channel_base': 64, 'channel_max': 8}
_GROWTH = {'first_resolution': 8, 'train_kimg': 0.1, 'fade_kimg': 0.1, 'batch_sizes': {}}
_TRAINING = {'kimg': 0.32, 'batch_size': 8, 'ema_kimg': 0.05, 'log_every': 0.08, 'checkpoint_every': 0.16, 'device': 'cpu'}
NETWORKS = {
    'progressive_gan': {'latents': 8, 'channel_base': 64, 'channel_max': 8, 'growth': _GROWTH, 'training': _TRAINING},
    'stylegan1': {**_STYLE, 'growth': {**_GROWTH, 'learning_rates': {}}, 'training': _TRAINING},
    'stylegan2': {**_STYLE, 'training': _TRAINING},
    'stylegan3': {**_STYLE, 'layers': 4, 'margin': 2, 'training': _TRAINING},
    'diffusion': {'process': 'edm', 'channels': 8, 'multipliers': [1], 'blocks': 1, 'attention': [], 'patch': 2, 'sampler': 'dpm_solver', 'sampling_steps': 4, 'training': _TRAINING},
}
SEGMENTER = {'data': DATA, 'segmenter': {'kind': 'unet', 'levels': 3, 'filters': 8, 'optimiser': 'adamw', 'learning_rate': 0.01, 'validate_every': 0.5,
                                         'training': {'kimg': 1, 'batch_size': 8, 'checkpoint_every': 0.5, 'device': 'cpu'}}}
EVALUATION = {'memorization': {'percentile': 90}, 'fidelity': [{'replicates': 10}]}

def generator(
    kind: str,
    seed: int=0,
    images: int=40,
    **training, # what differs in its training
) -> dict:      # a GeneratorRun as plain data
    "A tiny generator."
    network = NETWORKS[kind]
    return {'data': DATA, 'images': images, 'seed': seed, 'generator': {'kind': kind, **network, 'training': {**network['training'], **training}}}

def study(
    *generators: dict,
    **differs,
) -> dict:      # a Study as plain data
    "A tiny study: one training for each mixture."
    return {'data': DATA, 'generators': list(generators), 'segmenters': [SEGMENTER], 'augmentation': [True], 'seeds': [0], 'evaluation': EVALUATION, **differs}
