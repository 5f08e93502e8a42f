"Faults within one process: a disk that fills up at any write, a loss that is not a number. What is there stays whole, the message says what to do, and the same call goes on as if nothing had happened."
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from synthmr.checkpoints import newest_checkpoint
from synthmr.data.prepare import PrepareParams, prepare
from synthmr.data.simulated import SimulatedParams, simulate_cohort
from synthmr.slices import SliceStore, StoreError, StoreWriter
from synthmr.training import TrainingError
from test_training import BATCH, STEPS, Toy, lines, train_toy, weights

PAGE = 4096

class SmallDisk:
    "A file system in memory, with a file that takes what others shall not have."
    def __init__(self, place: Path): self.place, self.ballast = place, place/'ballast'
    def free(self): self.ballast.unlink(missing_ok=True)
    def fill(self, left: int):
        "Leave so many pages."
        with open(self.ballast, 'wb', buffering=0) as f:
            try:
                while f.write(bytes(PAGE)): pass
            except OSError: pass
            f.truncate(max(0, f.tell() - left * PAGE))

@pytest.fixture
def disk(tmp_path):
    "A disk of 4 MB."
    place = tmp_path/'disk'
    place.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', place], capture_output=True, text=True)
    if mounted.returncode: pytest.skip(f'no small disk can be mounted here: {mounted.stderr.strip()}')
    yield SmallDisk(place)
    subprocess.run(['umount', '-l', place], check=True)

class Painter(Toy):
    "The toy with a picture, which fills the disk in the middle of a step."
    fill = staticmethod(lambda step: None)
    def preview(self): self.fill('preview'); return torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    def paint(self, batch, step): self.fill(step); return super().paint(batch, step)

def paint(folder: Path, fill=None, preview_every: float|None=6*BATCH/1000):
    torch.manual_seed(0)
    model = Painter()
    if fill: model.fill = fill
    return train_toy(folder, 'plain', model=model, preview_every=preview_every)

@pytest.fixture(scope='module')
def store(tmp_path_factory) -> SliceStore:
    "A store of simulated noise."
    with StoreWriter(tmp_path_factory.mktemp('faults')/'store', {'resolution': 8, 'simulated': True}) as writer:
        writer.append('all', np.random.default_rng(0).integers(0, 256, (30, 5, 8, 8), np.uint8), [dict(subject='a', z=z, split='train', tumour=1) for z in range(30)])
        return writer.finish()

def test_training_on_a_disk_that_fills_up(store, disk):
    "Whatever file is the first that does not fit: one line names it, the checkpoints before are whole, and after there is space the weights are those of an undisturbed training."
    undisturbed, named = paint(store.path.parent/'undisturbed'), set()
    (disk.place/'store').symlink_to(store.path)
    for at, left in [('beginning', 0), ('beginning', 1), ('preview', 0), ('preview', 1), *((at, left) for at in (22, STEPS - 1) for left in (0, 1, 2, 3, 8))]:
        folder = disk.place/f'{at}-{left}'
        if at == 'beginning': disk.fill(left)
        try: paint(folder, lambda step: disk.fill(left) if step == at else None, None if at == STEPS - 1 else 6*BATCH/1000)    # without pictures the weights are what comes last
        except TrainingError as e:
            assert 'the disk is full; free some space' in str(e) and str(folder) in str(e) and '\n' not in str(e)
            named.add(Path(str(e).split(':')[0]).name.split('-')[0].split('.')[0])
            assert not list(folder.glob('*.partial'))
            if isinstance(at, int):
                with warnings.catch_warnings(): warnings.simplefilter('error'); state, _ = newest_checkpoint(folder)
                assert state['step'] % 5 == 0 and state['step'] >= at//5*5
        disk.free()
        paint(folder)
        assert weights(folder) == weights(undisturbed) and lines(folder) == lines(undisturbed), (at, left)
    assert {'checkpoint', 'events', 'weights', 'preview', 'config'} <= named, named

def test_a_log_that_does_not_fit(store, disk):
    "A line of the log that is cut in its middle is not read again, and stands there once in the end."
    (disk.place/'store').symlink_to(store.path)
    folder = disk.place/'log'
    def fill(step):
        if step == 21:
            size = (folder/'log.jsonl').stat().st_size
            with open(folder/'log.jsonl', 'a') as f: f.write(' ' * (PAGE - size % PAGE - 20))   # so that the next line needs another page
            disk.fill(0)
    with pytest.raises(TrainingError, match='log.jsonl: cannot be written: the disk is full'): paint(folder, fill)
    disk.free()
    paint(folder)
    assert lines(folder) == lines(paint(store.path.parent/'whole log'))

def group(k: int) -> tuple[str, np.ndarray, list[dict]]:
    "Noise of 20 pages as a group of slices."
    return f'g{k}', np.random.default_rng(k).integers(0, 256, (4, 5, 64, 64), np.uint8), [dict(subject=f'g{k}', z=z, split='train', tumour=1) for z in range(4)]

@pytest.mark.parametrize('again', ['the same writer', 'another writer'])
def test_a_store_on_a_disk_that_fills_up(disk, tmp_path, again):
    "A group that does not fit is not there at all; journal and images agree, and the same call goes on."
    meta = {'resolution': 64, 'simulated': True}
    with StoreWriter(tmp_path/'whole', meta) as writer:
        for k in range(12): writer.append(*group(k))
        whole = writer.finish()
    path, refused = disk.place/'store', 0
    writer = StoreWriter(path, meta)
    for k in range(12):
        for left in (0, 5, 19, 20):     # pages; with 20 the images fit
            size = (path.with_name('store.partial')/'images.npy').stat().st_size
            disk.fill(left)
            try: writer.append(*group(k))
            except StoreError as e:
                assert str(e).startswith(f'{path}.partial: cannot be written: the disk is full; free some space') and '\n' not in str(e)
                assert (path.with_name('store.partial')/'images.npy').stat().st_size == size and f'g{k}' not in writer.done
                refused += 1
            else: break
            disk.free()
            if again == 'another writer': writer.close(); writer = StoreWriter(path, meta)
            assert len(writer.rows) == 4*k
        else: writer.append(*group(k))
        disk.free()
    assert refused >= 36
    disk.fill(0)
    with pytest.raises(StoreError, match='the disk is full'): writer.finish()
    writer.close(); disk.free()
    with pytest.raises(StoreError, match='half written'): SliceStore.open(path)
    with StoreWriter(path, meta) as writer: store = writer.finish()
    for name in ('images.npy', 'slices.csv', 'meta.json'): assert (path/name).read_bytes() == (whole.path/name).read_bytes()
    assert store.fingerprint == whole.fingerprint and {p.name for p in path.iterdir()} == {'images.npy', 'slices.csv', 'meta.json'}

def test_preparation_on_a_disk_that_fills_up(disk, tmp_path):
    simulate_cohort(tmp_path/'cohort', SimulatedParams(subjects=4, spacing=5, workers=0), progress=False)
    params = PrepareParams(nifti=str(tmp_path/'cohort'), resolution=64, test_share=0.5, workers=0)
    whole = prepare(params, tmp_path/'whole', progress=False)
    disk.fill((len(whole)*5*64*64//PAGE + 4)//2)
    with pytest.raises(StoreError, match='store.partial: cannot be written: the disk is full; .* it goes on after the last whole group'): prepare(params, disk.place/'store', progress=False)
    assert (disk.place/'store.partial'/'journal.jsonl').read_bytes().count(b'\n') in (1, 2)
    disk.free()
    prepare(params, disk.place/'store', progress=False)
    for name in ('images.npy', 'slices.csv', 'meta.json'): assert (disk.place/'store'/name).read_bytes() == (whole.path/name).read_bytes()

def test_a_kill_while_a_store_gets_its_name(tmp_path, monkeypatch):
    "Until the folder has its name, the journal is there to go on from; after that the store is whole."
    meta = {'resolution': 64, 'simulated': True}
    class Killed(BaseException): pass
    def die(*a, **kw): raise Killed
    for name, target in (('before', 'os.replace'), ('after', 'pathlib.Path.unlink')):
        writer = StoreWriter(tmp_path/name, meta)
        writer.append(*group(0))
        import synthmr.slices
        with monkeypatch.context() as patch:
            if name == 'before': patch.setattr(synthmr.slices, 'give_name', die)
            else: patch.setattr(target, die)
            with pytest.raises(Killed): writer.finish()
        writer.close()
        if name == 'before':
            with StoreWriter(tmp_path/name, meta) as writer: assert writer.done == {'g0'}; writer.finish()
        assert np.array_equal(SliceStore.open(tmp_path/name)[:], group(0)[1])

def test_a_loss_that_is_not_a_number_says_what_to_do(store):
    "What was written before is not touched."
    class Bad(Toy):
        def paint(self, batch, step):
            if step == 16: self.kept = {p: p.read_bytes() for p in folder.rglob('checkpoint-*/*')}
            loss, logs = super().paint(batch, step)
            return loss * (float('nan') if step == 17 else 1), logs
    folder = store.path.parent/'nan'
    torch.manual_seed(0)
    model = Bad()
    with pytest.raises(TrainingError, match="phase 'generator', step 17: loss nan.* goes on from its last checkpoint.* lower the learning rate") as e: train_toy(folder, 'plain', model=model)
    assert str(e.value).startswith(str(folder)) and '\n' not in str(e.value)
    assert len(model.kept) > 4 and {p: p.read_bytes() for p in folder.rglob('checkpoint-*/*')} == model.kept
