"Training that is killed: by SIGKILL in a process of its own, at a random step and at every flush to the disk. Run with arguments, this file is the victim."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss, softplus

from synthmr.slices import SliceStore, StoreWriter
from synthmr.training import Phase, Trainable, TrainingError, TrainingParams, load_weights, train
from synthmr.watching import read_events

class Toy(Trainable):
    "Two networks against each other, with dropout, a buffer, a lazy phase and one optimiser for two phases."
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.LeakyReLU(), nn.Conv2d(8, 5, 3, padding=1))
        self.critic = nn.Sequential(nn.Conv2d(5, 8, 3, stride=2), nn.LeakyReLU(), nn.Flatten(), nn.LazyLinear(1))
        self.critic(torch.zeros(1, 5, 8, 8))
        self.register_buffer('mean_loss', torch.zeros([]))
        self.averaged = self.generator

    def fake(self, batch): return self.generator(batch + torch.randn_like(batch))
    def criticise(self, batch, step): return softplus(self.critic(self.fake(batch))).mean() + softplus(-self.critic(batch)).mean(), {'real': self.critic(batch).mean()}
    def regularise(self, batch, step):
        batch = batch.requires_grad_(True)
        gradient, = torch.autograd.grad(self.critic(batch).sum(), batch, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean(), {}
    def paint(self, batch, step):
        assert not any(p.requires_grad or p.grad is not None for p in self.critic.parameters()) and all(p.requires_grad for p in self.generator.parameters())
        loss = softplus(-self.critic(self.fake(batch))).mean() + mse_loss(self.fake(batch), batch)
        self.mean_loss.lerp_(loss.detach(), 0.1)
        return loss + 0.1*self.mean_loss, {'step': step}

    def phases(self):
        critic = torch.optim.Adam(self.critic.parameters(), 1e-3, betas=(0., 0.99))
        return [Phase('critic', self.critic, critic, self.criticise), Phase('r1', self.critic, critic, self.regularise, every=4),
                Phase('generator', self.generator, torch.optim.SGD(self.generator.parameters(), 1e-3, momentum=0.9), self.paint, learning_rate=lambda t: (1 - t)**0.9)]

STEPS, BATCH = 60, 8
PARAMS = dict(kimg=STEPS*BATCH/1000, batch_size=BATCH, ema_kimg=0.05, log_every=2*BATCH/1000, checkpoint_every=5*BATCH/1000, device='cpu')
VARIANTS = {'plain': {}, 'all': dict(accumulate=2, workers=1, precision='bf16', clip=1)}
SHARED = dict(accumulate=2)     # one process or two

def score(model): return torch.rand([]).item() / 2 - model.generator[1].num_batches_tracked.item()   # the first is the best, and it draws from the generator

def train_toy(folder: Path, variant: str, pause: float=0, seed: int=3, model=None, **changed):
    "Train the toy in `folder`, resting before each step."
    torch.set_num_threads(1); torch.manual_seed(0)
    model, store = model or Toy(), SliceStore.open(folder.parent/'store')
    validate = dict(validate=score, validate_every=7*BATCH/1000) if variant == 'all' else {}
    def rest(batch): time.sleep(pause); return batch + 0.01*torch.randn_like(batch)
    return train(model, [store, store.select(store.slices.z < 9)], TrainingParams(**{**PARAMS, **(SHARED if variant == 'shared' else VARIANTS[variant]), **changed}), folder, seed,
                 prepare_batch=rest, config={'model': 'toy'}, progress=False, **validate)

def lines(folder: Path) -> list[dict]:
    "The log without the times."
    return [{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in (folder/'log.jsonl').read_text().splitlines()]

def logged(folder: Path) -> list[tuple]:
    "The events without the times."
    return [(e.step, v.tag, v.simple_value) for e in read_events(folder/'events') for v in e.summary.value if v.tag != 'seconds']

def weights(folder: Path) -> bytes: return (folder/'weights.safetensors').read_bytes()

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with a store of simulated noise, and undisturbed trainings."
    home = tmp_path_factory.mktemp('training')
    with StoreWriter(home/'store', {'resolution': 8, 'simulated': True}) as writer:
        writer.append('all', np.random.default_rng(0).integers(0, 256, (30, 5, 8, 8), np.uint8), [dict(subject='a', z=z, split='train', tumour=1) for z in range(30)])
        writer.finish()
    for variant in VARIANTS: train_toy(home/variant, variant)
    return home

def victim(folder: Path, variant: str, pause: float) -> subprocess.Popen: return subprocess.Popen([sys.executable, __file__, folder, variant, str(pause)], stderr=subprocess.PIPE, text=True)

def test_undisturbed(home):
    "Every step is logged once, weights load, and runs differ by their seed."
    for variant in VARIANTS:
        assert [line['step'] for line in lines(home/variant) if 'validation' not in line] == [s for s in range(2, STEPS + 1, 2) if variant == 'plain' or (s % 7 and s != STEPS)]
    assert [line['step'] for line in lines(home/'all') if 'validation' in line] == [*range(7, STEPS, 7), STEPS]
    load_weights(Toy(), home/'plain')
    other = train_toy(home/'other', 'plain', seed=4)
    assert weights(other) != weights(home/'plain') and lines(other) != lines(home/'plain')

@pytest.mark.parametrize('variant', VARIANTS)
def test_sigkill(home, variant):
    "SIGKILL at a random step; a new process ends with the same weights, bit for bit, and the same log."
    folder, at = home/f'killed-{variant}', random.randrange(6, 24)
    process = victim(folder, variant, 0.03)
    while not (folder/'log.jsonl').exists() or len((folder/'log.jsonl').read_text().splitlines()) < at:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    refused = None
    try: train_toy(folder, variant)
    except TrainingError as e: refused = str(e)
    process.send_signal(signal.SIGKILL); process.wait()
    assert refused and 'another process' in refused
    assert not (folder/'weights.safetensors').exists() and 1 <= len(list(folder.glob('checkpoint-*'))) <= 3
    resumed = victim(folder, variant, 0)
    assert resumed.wait() == 0, resumed.stderr.read()
    assert weights(folder) == weights(home/variant), f'killed after {at} lines'
    assert lines(folder) == lines(home/variant)
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'events', 'log.jsonl', 'weights.safetensors']
    assert logged(folder) == logged(home/variant)

def test_two_processes_are_one(home):
    "Two processes that share the parts of a batch give the losses and the weights of one, up to the order of sums; what each draws belongs to the part, not to the process."
    one, two = train_toy(home/'one', 'shared'), home/'two'
    torchrun = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__, two, 'shared', '0'], capture_output=True, text=True)
    assert torchrun.returncode == 0, torchrun.stderr
    assert [line.keys() for line in lines(one)] == [line.keys() for line in lines(two)]
    for a, b in zip(lines(one), lines(two)): assert a == pytest.approx(b, rel=1e-3, abs=1e-4), a['step']
    a, b = (load_weights(Toy(), folder).generator.state_dict() for folder in (one, two))
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-4) for k in a if 'num_batches' not in k) and not a['0.weight'].equal(torch.zeros_like(a['0.weight']))
    assert sorted(p.name for p in two.iterdir()) == ['config.json', 'events', 'log.jsonl', 'weights.safetensors'] and len(list((two/'events').iterdir())) == 1
    assert [(step, tag) for step, tag, _ in logged(two)] == [(step, tag) for step, tag, _ in logged(one)]
    with pytest.raises(TrainingError, match='configuration'): train_toy(two, 'plain')

def test_parts_that_cannot_be_shared_are_refused(home, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '3')
    with pytest.raises(TrainingError, match='3 processes cannot share 2 parts'): train_toy(home/'thirds', 'shared')

def test_buffers_move_by_the_mean_of_the_parts(home):
    "A running mean of the batch is the same in one part and in four; a loss finds it as it was before the phase."
    class Mean(Trainable):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros([])); self.register_buffer('mean', torch.zeros([])); self.found = []
        def loss(self, batch, step):
            self.found.append(self.mean.item()); self.mean.lerp_(batch.mean(), 0.5)
            return (self.weight - batch.mean()).square(), {}
        def phases(self): return [Phase('mean', self, torch.optim.SGD(self.parameters(), 0.1), self.loss)]
    models = {}
    for parts in (1, 4):
        models[parts] = Mean()
        train(models[parts], [SliceStore.open(home/'store')], TrainingParams(**PARAMS, accumulate=parts), home/f'mean-{parts}', 1, progress=False)
    assert torch.allclose(models[1].mean, models[4].mean, atol=1e-6) and models[1].mean != 0
    assert np.allclose(np.repeat(models[1].found, 4), models[4].found, atol=1e-6)

def test_a_growing_batch(home):
    "The size of a batch may depend on the images seen; lengths stay in images, the model is told before each step, and a kill changes nothing."
    class Growing(Toy):
        def __init__(self): super().__init__(); self.told = []
        def batch_size(self, images, params): return 4 if images < 100 else 8
        def begin_step(self, images): self.told.append(images)
        def paint(self, batch, step):
            assert len(batch) == (4 if self.told[-1] < 100 else 8)
            if len(self.told) == self.stop: raise KeyboardInterrupt
            return super().paint(batch, step)
    def grow(name, stop=None):
        torch.manual_seed(0)
        model = Growing(); model.stop = stop
        try: train_toy(home/name, 'plain', model=model)
        except KeyboardInterrupt: pass
        return model.told
    told = grow('growing')
    assert told == [*range(0, 100, 4), *range(100, STEPS*BATCH, 8)] and lines(home/'growing')[-1]['kimg'] == pytest.approx((told[-1] + 8) / 1000)
    assert grow('grown', stop=20) == told[:20] and grow('grown')[-1] == told[-1] and weights(home/'grown') == weights(home/'growing')

def test_compiled(home):
    "A compiled network learns the same, within rounding; what is differentiated twice goes round the compiler."
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(5, 5, 3, padding=1)
        def forward(self, x): return nn.functional.leaky_relu(self.conv(x), 0.2)
    class Compiled(Trainable):
        def __init__(self): super().__init__(); self.net = self.averaged = Net()
        def loss(self, batch, step): return mse_loss(self.net(batch), batch), {}
        def smooth(self, batch, step):
            batch = batch.requires_grad_(True)
            return torch.autograd.grad(self.net.forward(batch).sum(), batch, create_graph=True)[0].square().mean(), {}
        def phases(self):
            optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)
            return [Phase('net', self.net, optimizer, self.loss), Phase('smooth', self.net, optimizer, self.smooth, every=2)]
    found = {}
    for compiled in (False, True):
        torch.manual_seed(0); torch._dynamo.utils.counters.clear()
        train(Compiled(), [SliceStore.open(home/'store')], TrainingParams(**PARAMS, compile=compiled), home/f'compiled-{compiled}', 1, progress=False)
        assert (torch._dynamo.utils.counters['stats']['unique_graphs'] > 0) == compiled
        found[compiled] = lines(home/f'compiled-{compiled}')
    for a, b in zip(found[False], found[True]): assert a == pytest.approx(b, rel=1e-3)

def test_killed_at_every_flush(home):
    "SIGKILL at the n-th flush to the disk or in the middle of the n-th write, for every n: whatever half-written file it leaves, the weights are the same."
    sweep = subprocess.run([sys.executable, __file__, home/'sweep', 'sweep'], capture_output=True, text=True)
    assert sweep.returncode == 0, sweep.stderr
    kills = sorted(home.glob('sweep-*'))
    assert len(kills) > 15
    for folder in kills: assert (weights(folder), lines(folder), logged(folder)) == (weights(home/'short'), lines(home/'short'), logged(home/'short')), folder.name

def sweep(folder: Path):
    "Train in forked processes that die at their n-th flush or write, and resume each."
    short, flush, n = dict(kimg=12*BATCH/1000, keep_checkpoints=True), os.fsync, 0
    write = Path.write_bytes
    def forked(f) -> int:
        child = os.fork()
        if child == 0:
            try: f()
            except BaseException: sys.excepthook(*sys.exc_info()); os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1]
    def train_until(last: int, place: Path):
        left = iter(range(last))
        def die(): os.kill(os.getpid(), signal.SIGKILL)
        def flush_or_die(descriptor): die() if next(left, None) is None else flush(descriptor)
        def write_or_die(path, content):
            if next(left, None) is None: write(path, content[:len(content)//2]); die()
            return write(path, content)
        os.fsync, Path.write_bytes = flush_or_die, write_or_die
        train_toy(place, 'plain', **short)
    train_toy(folder.parent/'short', 'plain', **short)  # here, so that the forks find all modules imported
    while True:
        place = Path(f'{folder}-{n}')
        status = forked(lambda: train_until(n, place))
        if status == 0: break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert forked(lambda: train_toy(place, 'plain', **short)) == 0
        n += 1

@pytest.mark.parametrize('harm', ['flip', 'cut', 'missing', 'state'])
def test_damaged_checkpoint(home, harm):
    "The newest checkpoint is damaged: the one before is taken with a warning, or the beginning where none is whole."
    folder = home/f'damaged-{harm}'
    class Stop(Exception): pass
    class Stopping(Toy):
        def paint(self, batch, step):
            if step == 33: raise Stop
            return super().paint(batch, step)
    torch.manual_seed(0)
    model = Stopping()
    with pytest.raises(Stop): train_toy(folder, 'plain', model=model)
    assert all(p.requires_grad for p in model.parameters())
    newest, before = folder/'checkpoint-30', folder/'checkpoint-25'
    file = newest/('state.json' if harm == 'state' else 'model.safetensors')
    content = bytearray(file.read_bytes())
    if harm == 'flip': content[len(content)//2] ^= 4; file.write_bytes(content)
    if harm in ('cut', 'state'): file.write_bytes(content[:-9])
    if harm == 'missing': file.unlink()
    if harm == 'missing': shutil.rmtree(before)
    with pytest.warns(UserWarning, match='checkpoint-30'): train_toy(folder, 'plain')
    assert weights(folder) == weights(home/'plain') and lines(folder) == lines(home/'plain')

@pytest.mark.parametrize('bad', ['loss', 'gradient'])
def test_not_finite(home, bad):
    "A loss or gradient that is not finite stops training before the weights are touched, and names phase and step."
    class Bad(Toy):
        def paint(self, batch, step):
            loss, logs = super().paint(batch, step)
            if step == 17: loss = loss*float('nan') if bad == 'loss' else loss + self.generator[4].bias.sub(self.generator[4].bias.detach()).abs().sqrt().sum()
            return loss, logs
    torch.manual_seed(0)
    model = Bad()
    with pytest.raises(TrainingError, match="phase 'generator', step 17"): train_toy(home/f'bad-{bad}', 'plain', model=model)
    assert all(p.isfinite().all() for p in model.parameters())
    assert sorted(p.name for p in (home/f'bad-{bad}').glob('checkpoint-*')) == ['checkpoint-10', 'checkpoint-15']
    train_toy(home/f'bad-{bad}', 'plain')   # the fault is mended
    assert weights(home/f'bad-{bad}') == weights(home/'plain')

def test_foreign_folder(home):
    "A folder of another training is refused, finished or not, in one line that names what differs; how it is carried out may differ."
    with pytest.raises(TrainingError, match=r'another configuration \(training.ema_kimg\)') as e: train_toy(home/'plain', 'plain', ema_kimg=0.06)
    assert '\n' not in str(e.value)
    with pytest.raises(TrainingError, match=r'\(seed\)'): train_toy(home/'plain', 'plain', seed=5)
    train_toy(home/'plain', 'plain', workers=2, log_every=1)
    (home/'strange').mkdir(); (home/'strange'/'config.json').write_text('{}')
    with pytest.raises(TrainingError, match='another configuration'): train_toy(home/'strange', 'plain')

def test_best_and_average(home):
    "The weights with the best score are kept; they are the average, which is not the weights."
    seen, made = [], [0.1, 0.9, 0.3]
    def judge(model): seen.append([model.generator[0].weight.clone(), model.training]); return made[len(seen) - 1]
    torch.manual_seed(0); torch.set_num_threads(1)
    model, store = Toy(), SliceStore.open(home/'store')
    folder = train(model, [store], TrainingParams(**PARAMS), home/'best', 1, validate=judge, validate_every=20*BATCH/1000, progress=False)
    best = load_weights(Toy(), folder).generator[0].weight
    assert len(seen) == 3 and best.equal(seen[1][0]) and not best.equal(seen[2][0])
    assert not model.generator[0].weight.equal(seen[2][0]) and model.training and not any(training for _, training in seen)

def test_average_by_hand(home):
    "The average that is kept is StyleGAN 2's: half-life in images, ramped up with the images seen."
    torch.manual_seed(0); torch.set_num_threads(1)
    model, store, seen = Toy(), SliceStore.open(home/'store'), []
    def look(batch): seen.append(model.generator[0].weight.detach().clone()); return batch
    folder = train(model, [store], TrainingParams(**PARAMS), home/'average', 1, prepare_batch=look, progress=False)
    average = seen[0]
    for step, weight in enumerate([*seen[1:], model.generator[0].weight]):
        half_life = min(50, 0.05*BATCH*step)
        keep = 0.5**(BATCH/half_life) if step else 0
        average = keep*average + (1 - keep)*weight
    kept = load_weights(Toy(), folder).generator[0].weight
    assert torch.allclose(kept, average, atol=1e-7) and not torch.allclose(kept, model.generator[0].weight, atol=1e-6)

if __name__ == '__main__':
    folder, variant = Path(sys.argv[1]), sys.argv[2]
    if variant != 'shared': warnings.simplefilter('error')
    sweep(folder) if variant == 'sweep' else train_toy(folder, variant, float(sys.argv[3]))
