"""Writes generators of the goldens in the formats of the official implementations, with stand-ins for the official classes. Runs as a process of its own, so that the reader's process never has those classes.

    python tests/official_files.py GOLDENS OUT      all files; OUT/called appears if a stand-in is called
"""
import json
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

class EasyDict(dict):
    "A dictionary whose keys are attributes, too."
    def __getattr__(self, name):
        try: return self[name]
        except KeyError: raise AttributeError(name) from None

class Network:
    "A TensorFlow network: its pickle is its state."
    def __init__(self, **state): self.state = state
    def __getstate__(self): return self.state

def stand_in(dotted: str, **content):
    "A module of that name with these classes and functions."
    parts = dotted.split('.')
    for i in range(1, len(parts) + 1): sys.modules.setdefault('.'.join(parts[:i]), types.ModuleType('.'.join(parts[:i])))
    for name, thing in content.items(): thing.__module__, thing.__qualname__ = dotted, name; setattr(sys.modules[dotted], name, thing)

def _reconstruct_persistent_obj(meta): raise AssertionError('a file was unpickled')

class Part(torch.nn.Module):
    "A module that is pickled with its source and its state, as the official ones are."
    def __init__(self, name: str, **facts):
        super().__init__()
        self._name, self._init_args, self._init_kwargs = name, (), EasyDict(facts)
        self.__dict__.update(facts)

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k != '_name'}
        return _reconstruct_persistent_obj, (dict(type='class', version=6, module_src='import os; os.system("touch called")', class_name=self._name, state=state),)

def tree(name: str, tensors: dict, facts: dict, place: str='') -> Part:
    "Modules that hold tensors by dotted name; what is called weight or bias is a parameter, the rest are buffers."
    made = Part(name, **{k: v for pattern, values in facts.items() if pattern == place.rstrip('.') for k, v in values.items()})
    for part in dict.fromkeys(k[len(place):].partition('.')[0] for k in tensors if k.startswith(place)):
        whole = place + part
        if whole not in tensors: made.add_module(part, tree(name, tensors, facts, whole + '.'))
        elif part in ('weight', 'bias', 'const'): made.register_parameter(part, torch.nn.Parameter(tensors[whole]))
        else: made.register_buffer(part, tensors[whole])
    return made

def starting(tensors: dict, letter: str) -> dict: return {k[len(letter) + 1:]: v for k, v in tensors.items() if k.startswith(letter + '.')}

def snapshot(goldens: Path, name: str) -> dict:
    "What a training of StyleGAN 2 or 3 saves."
    tensors, told = load_file(goldens/f'{name}.safetensors'), json.loads((goldens/f'{name}.json').read_text())
    config = told['generator_config']
    facts = {'': {**{k: config[k] for k in ('z_dim', 'c_dim', 'w_dim', 'img_resolution', 'img_channels')}, 'num_ws': told['num_ws']}, 'synthesis': {'output_scale': 0.25, 'block_resolutions': [4, 8, 16, 32], 'num_fp16_res': 0}}
    facts |= {f'mapping.fc{i}': {'activation': 'lrelu', 'weight_gain': 0.01 / 8, 'bias_gain': 0.01} for i in range(config['mapping_kwargs']['num_layers'])}
    for layer in told.get('layers', [])[1:]:
        facts[f"synthesis.{layer['name']}"] = {'conv_clamp': 256, 'in_cutoff': np.float64(layer['in_cutoff']), 'in_size': np.broadcast_to(np.asarray(layer['in_size']), [2]), 'padding': layer['padding_xlo_xhi_ylo_yhi'], 'down_radial': layer['down_radial']}
    if 'stylegan2' in name: facts |= {f'synthesis.b{r}': {'architecture': 'skip', 'use_fp16': False} for r in (4, 8, 16, 32)} | {f'synthesis.b{r}.conv1': {'activation': 'lrelu', 'use_noise': True, 'conv_clamp': None, 'act_gain': np.sqrt(2)} for r in (4, 8, 16, 32)}
    average = starting(tensors, 'G')
    G = tree('Generator', {k: torch.zeros_like(v) for k, v in average.items()}, facts)
    D = tree('Discriminator', starting(tensors, 'D'), {}) if any(k.startswith('D.') for k in tensors) else tree('Discriminator', {'b4.out.weight': torch.ones(1, 4)}, {})
    return dict(training_set_kwargs=EasyDict(class_name='training.dataset.ImageFolderDataset', path='/data/brats.zip', xflip=False, max_size=None), G=G, D=D, G_ema=tree('Generator', average, facts), augment_pipe=None)

def networks(goldens: Path, name: str, scale: float=1., lod: float=0.) -> list:
    "What a training of the progressive GAN or StyleGAN 1 saves: G, D, Gs."
    tensors, told = load_file(goldens/f'{name}.safetensors'), json.loads((goldens/f'{name}.json').read_text())
    style = name == 'stylegan1_32'
    kwargs = EasyDict({k: v for k, v in (told['generator_config'] if style else told['config']).items()})
    def network(title, state, **parts):
        variables = [(k, np.float32(lod) if k == 'lod' else v.numpy() * scale) for k, v in state.items()]
        return (sys.modules['dnnlib.tflib.network'] if style else sys.modules['tfutil']).Network(version=3, name=title, static_kwargs=kwargs, components=parts, build_module_src='import os\nos.system("touch called")', build_func_name='G_style', variables=variables)
    G = starting(tensors, 'G')
    parts = {part: network(f'G_{part}', {k.removeprefix(f'G_{part}/'): v for k, v in G.items() if k.startswith(f'G_{part}/')}) for part in ('synthesis', 'mapping')} if style else {}
    return network('Gs', {k: v for k, v in G.items() if not k.startswith('G_')}, **parts)

def unet(goldens: Path, learned: bool) -> OrderedDict:
    "The state that guided diffusion saves."
    tensors = load_file(goldens/'guided_unet64_weights.safetensors')
    state = torch.nn.Module().state_dict()      # an ordered dictionary with `_metadata`, as of any module
    state.update({k: v.float() for k, v in starting(tensors, 'U').items()} | ({k: v.float() for k, v in starting(tensors, 'U_learned').items()} if learned else {}))
    return state

def main(goldens: Path, out: Path):
    stand_in('torch_utils.persistence', _reconstruct_persistent_obj=_reconstruct_persistent_obj)
    stand_in('dnnlib.util', EasyDict=EasyDict)
    stand_in('dnnlib.tflib.network', Network=type('Network', (Network,), {}))
    stand_in('tfutil', Network=type('Network', (Network,), {}))
    def write(name, thing, protocol=4): (out/name).write_bytes(pickle.dumps(thing, protocol))
    for name in ('stylegan2_32', 'stylegan3t_32', 'stylegan3r_32'): write(f'{name}.pkl', snapshot(goldens, name))
    for protocol in (2, 3, 5): write(f'stylegan2_32-protocol{protocol}.pkl', snapshot(goldens, 'stylegan2_32'), protocol)
    for name in ('pggan_32', 'stylegan1_32'):
        three = tuple(networks(goldens, name, scale) for scale in (0, 0, 1))      # the last is the average
        for protocol in (2, 4, 5): write(f'{name}{"" if protocol == 4 else f"-protocol{protocol}"}.pkl', three, protocol)
        write(f'{name}-lod1.75.pkl', tuple(networks(goldens, name, lod=1.75) for _ in range(3)))
    for variance in ('fixed', 'learned'):
        for zipped in (True, False): torch.save(unet(goldens, variance == 'learned'), out/f"guided_unet64_{variance}{'' if zipped else '-legacy'}.pt", _use_new_zipfile_serialization=zipped)

if __name__ == '__main__': main(*map(Path, sys.argv[1:]))
