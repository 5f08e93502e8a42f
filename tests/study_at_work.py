"Studies that run while a test looks at them, or does them harm."
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from synthmr.params import load
from synthmr.studies.jobs import read_record
from synthmr.studies.runs import GeneratorRun

SYNTHMR = str(Path(sys.executable).with_name('synthmr'))
UNDISTURBED = """
from synthmr.params import load
from synthmr.studies.runs import GeneratorRun, make_data, train_generator
run = load(GeneratorRun, 'generator.yaml')
make_data(run.data); train_generator(run); print(run.folder)
"""

def start(name: str, plan: dict, *arguments: str) -> subprocess.Popen:
    "Begin a study."
    Path(name).write_text(yaml.safe_dump(plan))
    return subprocess.Popen([SYNTHMR, 'study', name, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def end(process: subprocess.Popen, seconds: float=900) -> tuple[int, str, str]:
    "Exit code and what it said."
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err

def until(condition, seconds: float=300):
    "Wait for something; its value."
    limit = time.time() + seconds
    while time.time() < limit:
        if value := condition(): return value
        time.sleep(0.1)
    raise AssertionError('waited in vain')

class Watched:
    "A generator that is being trained in the working directory."
    def __init__(self, generator: dict):
        self.generator = generator
        Path('generator.yaml').write_text(yaml.safe_dump(generator))
        self.run = load(GeneratorRun, 'generator.yaml')
        self.training = self.run.folder/'training'

    @property
    def record(self) -> dict: return read_record(Path('artifacts')/'tiny'/'jobs'/f'{self.run.name}.json')

    def step(self) -> int:
        "Of the newest checkpoint, 0 where there is none."
        return max((int(p.name[11:]) for p in self.training.glob('checkpoint-*') if p.name[11:].isdigit()), default=0)

    def until_running(self, beyond: int=0, attempt: int=1) -> int:
        "Wait until it runs and has a checkpoint newer than that; its step."
        until(lambda: self.record.get('state') == 'running' and self.record['attempt'] >= attempt and self.step() > beyond)
        return self.step()

    def kernel(self) -> psutil.Process:
        "The process that trains."
        return until(lambda: [c for c in psutil.Process(self.record['pid']).children() if 'ipykernel' in ' '.join(c.cmdline())])[0]

    def steps_logged(self) -> list[int]: return [json.loads(line)['step'] for line in (self.training/'log.jsonl').read_text().splitlines()]
    def weights(self) -> bytes: return (self.training/'weights.safetensors').read_bytes()

    def undisturbed_weights(self) -> bytes:
        "What a training gives that nothing happens to."
        Path('generator.yaml').write_text(yaml.safe_dump(self.generator))
        environment = {**os.environ, 'SYNTHMR_HOME': str(Path('undisturbed').resolve()), 'OMP_NUM_THREADS': '1'}
        done = subprocess.run([sys.executable, '-c', UNDISTURBED], env=environment, capture_output=True, text=True, check=True)
        return (Path(done.stdout.split()[-1])/'training'/'weights.safetensors').read_bytes()

def finished() -> dict[str, int]:
    "When each table of the study in the working directory was written."
    return {p.name: p.stat().st_mtime_ns for p in Path('results/tiny').glob('*.csv')}
