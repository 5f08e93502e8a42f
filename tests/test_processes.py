"A generator that is trained by several processes, from its parameters to its weights."
import os
import subprocess
import sys
from pathlib import Path

import yaml

DATA = {'dataset': 'tiny', 'simulated': {'subjects': 4, 'seed': 3, 'spacing': 4}, 'resolution': 16, 'test_share': 0.25}
RUN = {'data': DATA, 'images': 8, 'generator': {'kind': 'stylegan2', 'latents': 8, 'width': 8, 'mapping_layers': 1, 'channel_base': 64, 'channel_max': 8, 'r1_every': 2, 'path_every': 2,
       'training': {'kimg': 0.08, 'batch_size': 8, 'accumulate': 2, 'ema_kimg': 0.02, 'log_every': 0.016, 'processes': 2, 'device': 'cpu'}}}
CODE = """
from synthmr.params import load
from synthmr.studies.runs import GeneratorRun, make_data, make_generator
run = load(GeneratorRun, 'run.yaml')
make_data(run.data)
generator, samples = make_generator(run)
print(len(samples), run.folder)
"""

def test_from_parameters_to_samples(tmp_path):
    "`training.processes` starts them, the notebook's process finds the weights and goes on; a wrong parameter's message reaches the terminal."
    (tmp_path/'params').mkdir(); (tmp_path/'settings.ini').touch(); (tmp_path/'run.yaml').write_text(yaml.safe_dump(RUN))
    environment = {k: v for k, v in os.environ.items() if k != 'SYNTHMR_HOME'} | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', CODE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n, folder = done.stdout.strip().splitlines()[-1].split(maxsplit=1)
    assert n == '8' and sorted(p.name for p in (Path(folder)/'training').iterdir()) == ['config.json', 'events', 'log.jsonl', 'preview.png', 'weights.safetensors']
