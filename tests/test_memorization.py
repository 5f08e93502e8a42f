"Nearest training images against plain arithmetic, with and without bounds; planted copies are found, held-out images flagged at the stated rate."
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from synthmr.data.prepare import example_store
from synthmr.metrics.bounds import nearest_bounded, summarise
from synthmr.metrics.memorization import MemorizationParams, calibrate, memorization, report, summary
from synthmr.metrics.nearest import VIEWS, Transformation, nearest, transformations

def plainly(x, y, view) -> np.ndarray:
    "All correlations in float64, nan where there is none."
    x, y = (a[:, list(view)].reshape(len(a), -1).astype(float) for a in (x, y))
    with np.errstate(invalid='ignore'): return np.corrcoef(x, y)[:len(x), len(x):]

def some_images(kind: str, n: int, size: int, rng) -> np.ndarray:
    "uint8 (n, 5, size, size) of one kind."
    if kind == 'noise': return rng.integers(0, 256, (n, 5, size, size), dtype=np.uint8)
    if kind == 'smooth': return (rng.integers(0, 240, (n, 5, size // 4, size // 4)).repeat(4, 2).repeat(4, 3) + rng.integers(0, 16, (n, 5, size, size))).astype(np.uint8)
    if kind == 'binary': return (rng.integers(0, 2, (n, 5, size, size)) * 255).astype(np.uint8)
    if kind == 'sparse': return (rng.binomial(1, 0.002, (n, 5, size, size)) * 255).astype(np.uint8)       # often constant
    if kind == 'alike': return (rng.integers(0, 250, (5, size, size)) + rng.integers(0, 3, (n, 5, size, size))).astype(np.uint8)
    if kind == 'few': return some_images('smooth', 4, size, rng)[rng.integers(0, 4, n)]                   # many ties

KINDS = ('noise', 'smooth', 'binary', 'sparse', 'alike', 'few')

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('precision', ['int8', 'fp32', 'bf16'])
def test_the_nearest_is_that_of_plain_arithmetic(kind, precision):
    rng = np.random.default_rng(0)
    x, y = some_images(kind, 13, 16, rng), some_images(kind, 57, 16, rng)
    found = nearest(x, y, precision=precision, memory=rng.uniform(6e4, 1e6), progress=False)
    for name, view in VIEWS.items():
        r, mine = plainly(x, y, view), found[found.view == name]
        highest = np.where(np.isfinite(r), r, -np.inf).max(axis=1)
        np.testing.assert_allclose(mine.correlation.fillna(-np.inf), highest, rtol=0, atol=1e-12)
        for q, j in zip(mine['query'], mine.nearest):
            if j >= 0:
                equal = np.flatnonzero(r[q] > highest[q] - 1e-12)
                assert j in equal and (kind != 'few' or j == equal[0])
            else: assert highest[q] == -np.inf

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('kind', KINDS)
def test_bounds_change_nothing(kind, seed):
    rng = np.random.default_rng([seed, 1])
    size, n, m = int(rng.choice([8, 16, 32])), int(rng.integers(1, 40)), int(rng.integers(1, 300))
    x, y = some_images(kind, n, size, rng), some_images(kind, m, size, rng)
    x[:n // 3] = y[rng.integers(0, m, n // 3)]
    ways = transformations(bool(seed % 2), seed // 3)
    expected = nearest(x, y, ways=ways, progress=False)
    squares, precision, limit = int(rng.choice([2, 4, 8])), ('bf16', 'fp32')[seed % 2], float(rng.uniform(0, 1))
    known, memory = summarise(y, squares), rng.uniform(3e5, 3e6)
    pd.testing.assert_frame_equal(nearest_bounded(x, y, known, ways=ways, precision=precision, memory=memory, progress=False), expected, check_exact=True)
    high = nearest_bounded(x, y, known, ways=ways, at_least=limit, precision=precision, memory=memory, progress=False)
    assert high.nearest.eq(expected.nearest.where(expected.correlation >= limit, -1)).all()
    assert np.array_equal(high.correlation, expected.correlation.where(expected.correlation >= limit), equal_nan=True)

def test_part_of_a_store_counts_from_its_own_beginning():
    store = example_store(resolution=32)
    training = store.where(split='train').select(np.arange(len(store.where(split='train'))) % 3 > 0)
    found = nearest(training[10:13], training, progress=False)
    assert (found.correlation == 1).all() and found[found.view == 'whole'].nearest.tolist() == [10, 11, 12]

MEMORY = """
import sys, threading, time, numpy as np, torch
from synthmr.metrics.nearest import nearest
torch.set_num_threads(1)
training = np.load(sys.argv[1], mmap_mode='r')
nearest(training[:2], training[:4], progress=False)
def anonymous(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) * 1024
before, peak, done = anonymous(), [0], []
def watch():
    while not done: peak[0] = max(peak[0], anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
nearest(training[:60], training, memory=float(sys.argv[2]), progress=False)
done.append(1); thread.join(); print(peak[0] - before)
"""

@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_is_bounded(tmp_path):
    images = np.lib.format.open_memmap(tmp_path/'training.npy', 'w+', np.uint8, (600, 5, 256, 256))        # 197 MB
    for i in range(len(images)): images[i] = np.arange(256, dtype=np.uint8) * (i % 7 + 1)
    images.flush()
    done = subprocess.run([sys.executable, '-c', MEMORY, tmp_path/'training.npy', '40e6'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60e6     # the bound, and what the allocator keeps

# Calibration, on simulated subjects

@pytest.fixture(scope='module')
def simulated():
    store = example_store(resolution=64, subjects=16)
    return store.where(split='train'), store.where(split='test'), example_store(resolution=64, subjects=8, seed=1)

@pytest.mark.parametrize('squares', [0, 4])
def test_planted_copies_are_found(simulated, squares):
    training, held_out, fresh = simulated
    rng, places = np.random.default_rng(0), np.linspace(1, len(training) - 2, 8).astype(int)
    originals = training[places]
    noisy = np.clip(originals + rng.normal(0, 6, originals.shape) * (originals > 0), 0, 255).astype(np.uint8)
    copies = [originals, noisy, Transformation(False, 2, 0)(originals), Transformation(False, -2, 2)(originals)]
    for c in range(4): changed = originals.copy(); changed[:, c] = fresh[::len(fresh) // 8][:8, c]; copies.append(changed)
    images = np.concatenate([fresh[::7], *copies])
    found, baseline, calibration = memorization(images, held_out, training, MemorizationParams(shift=2, squares=squares), progress=False)
    planted = found.iloc[len(fresh[::7]):]
    assert calibration.percentile == 99 and planted.too_close.all() and (planted.nearest == np.tile(places, len(copies))).all()
    assert (planted.subject == training.slices.subject.iloc[planted.nearest].to_numpy()).all()
    others = found.iloc[:len(fresh[::7])]
    assert others.too_close.mean() < 0.1 and baseline.too_close.mean() <= 0.01 and summary(found, calibration)['p'] < 1e-6

def test_held_out_images_are_flagged_at_the_stated_rate(simulated):
    "Images of subjects that were not trained on, shuffled so that they are exchangeable: half are the baseline, half are judged."
    training, held_out, fresh = simulated
    images = np.concatenate([held_out[:], fresh[:]])
    found, rng, rates = nearest(images, training, progress=False), np.random.default_rng(0), []
    for _ in range(40):
        order = rng.permutation(len(images)); base, new = order[::2], order[1::2]
        part = [found[found['query'].isin(rows)] for rows in (base, new)]
        calibration = calibrate(part[0], np.zeros(len(base)), percentile=90)
        rates.append(report(part[1], calibration, training).too_close.mean())
    error = np.std(rates) / np.sqrt(len(rates))
    assert abs(np.mean(rates) - calibration.expected) < 4 * error + 0.01, (np.mean(rates), calibration.expected)

def test_dependent_slices_are_seen_in_the_interval_of_subjects():
    "Slices of one subject that are all alike: the bootstrap of subjects is wider than the interval that counts images."
    rng = np.random.default_rng(0)
    level = np.repeat(rng.normal(0, 0.3, 40), 20) + rng.normal(0, 0.05, 800)
    baseline = pd.DataFrame({'query': np.arange(800), 'view': 'whole', 'nearest': 0, 'correlation': np.tanh(1.5 + level)})
    c = calibrate(baseline, np.repeat(np.arange(40), 20), percentile=95)
    assert c.left_out_interval[1] - c.left_out_interval[0] > 2 * (c.interval[1] - c.interval[0]) and c.subjects == 40
    assert c.left_out_interval[0] <= 0.05 <= c.left_out_interval[1] and c.guaranteed >= 1 / 41
