"The release gate, on simulated subjects: planted copies and duplicates are found and named, honest stores pass at the stated rate, an over-fitted generator is told, dropping removes what it names."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats
from scipy.ndimage import gaussian_filter

import synthmr.privacy.searches
from synthmr.cli import main
from synthmr.data.prepare import example_store
from synthmr.generators.diffusion import DiffusionParams
from synthmr.generators.families import build_generator
from synthmr.generators.sampling import sample_store
from synthmr.metrics.nearest import Transformation, nearest
from synthmr.params import load
from synthmr.privacy.audit import AuditParams, audit
from synthmr.privacy.gate import Audit, AuditRecord
from synthmr.privacy.searches import Alteration, Narrowed, Searches
from synthmr.slices import SliceStore, StoreWriter
from synthmr.studies.runs import DataRun, make_data
from synthmr.training import load_weights, train

QUICK = AuditParams(replicates=100, permutations=399)

def store_of(path: Path, images: np.ndarray, splits=None) -> SliceStore:
    "Images as a synthetic store."
    with StoreWriter(path, {'resolution': images.shape[-1], 'spacing': [4, 4, 4], 'simulated': True, 'generator_name': 'simulated'}) as writer:
        writer.append('all', images, [dict(seed=7, number=i, split='train', tumour=int((image[4] > 0).sum())) for i, image in enumerate(images)])
        return writer.finish()

def cohort() -> SliceStore: return example_store(resolution=64, subjects=40, seed=11)

def split_by_lot(seed: int, training: int, held_out: int, rest: int) -> list[SliceStore]:
    "Disjoint subjects of the cohort."
    names = np.random.default_rng(seed).permutation(cohort().subjects)
    return [cohort().where(subject=list(part)) for part in np.split(names[:training + held_out + rest], np.cumsum([training, held_out]))]

@pytest.fixture(scope='module')
def sets() -> list[SliceStore]: return split_by_lot(3, 16, 10, 8)

def sequences(images: np.ndarray, f) -> np.ndarray:
    "Images whose sequences have gone through a function."
    out = images.astype(float)
    out[:, :4] = f(out[:, :4])
    return np.clip(out.round(), 0, 255).astype(np.uint8)

ALTERED = {
    'exact': lambda i: i,
    'noisy': lambda i: sequences(i, lambda v: v + np.random.default_rng(0).normal(0, 8, v.shape) * (v > 0)),
    'moved': Transformation(False, 1, -1),
    'mirrored': Transformation(True),
    'gain and offset': lambda i: sequences(i, lambda v: 0.6 * v + 15),
    'gamma 0.6': lambda i: sequences(i, lambda v: 255 * (v / 255)**0.6),
    'gamma 1.7': lambda i: sequences(i, lambda v: 255 * (v / 255)**1.7),
    'S-shaped curve': lambda i: sequences(i, lambda v: 255 / (1 + np.exp((110 - v) / 25))),
}

# Copies

def test_planted_copies_fail_the_audit_and_are_named(sets, tmp_path):
    training, held_out, others = sets
    fresh = others[:][::2]
    places = np.linspace(2, len(training) - 3, 2 * len(ALTERED)).astype(int)
    copies = np.concatenate([f(training[places[2 * k:2 * k + 2]]) for k, f in enumerate(ALTERED.values())])
    params = QUICK.model_copy(update={'shift': 1})
    found = audit(store_of(tmp_path/'with', np.concatenate([fresh, copies])), training, held_out, params, progress=False)
    planted = found.images.iloc[len(fresh):]
    assert not found.passed and not next(c for c in found.criteria if c.name == 'copies').passed
    assert planted.copied.all(), planted[~planted.copied]
    assert planted.nearest.tolist() == places.tolist() and planted.subject.tolist() == training.slices.subject.iloc[places].tolist()
    assert planted.transformation.iloc[[4, 6]].tolist() == ['shift -1 +1', 'flip']
    assert not found.images.copied.iloc[:len(fresh)].any()
    assert set(found.subjects.subject[found.subjects.copies > 0]) == set(planted.subject) and found.subjects.copies.sum() == len(planted) and found.subjects.copies.is_monotonic_decreasing
    honest = audit(store_of(tmp_path/'without', fresh), training, held_out, params, progress=False)
    assert honest.passed and not honest.images.copied.any() and honest.subjects.copies.sum() == 0

def test_negatives_are_found_where_they_are_looked_for(sets, tmp_path):
    training, held_out, others = sets
    images = np.concatenate([others[:][::2], Alteration(negative=True)(training[[5, 90]])])
    store = store_of(tmp_path/'store', images)
    missed, seen = (audit(store, training, held_out, QUICK.model_copy(update={'negatives': n}), progress=False).images.iloc[-2:] for n in (False, True))
    assert not missed.copied.any() and seen.copied.all() and seen.nearest.tolist() == [5, 90] and set(seen.transformation) == {'negative'}

def test_smooth_images_that_resemble_everybody_do_not_fail(sets, tmp_path):
    training, held_out, others = sets
    smooth = sequences(others[:][::2], lambda v: gaussian_filter(v, (0, 0, 0.8, 0.8)))
    found = audit(store_of(tmp_path/'smooth', smooth), training, held_out, QUICK, progress=False)
    assert all(c.passed for c in found.criteria if c.name in ('copies', 'too close'))

# Duplicates

def test_planted_duplicates_are_found(sets, tmp_path):
    training, held_out, others = sets
    fresh = others[:][::2]
    noisy = sequences(fresh[20:23], lambda v: v + np.random.default_rng(1).normal(0, 3, v.shape) * (v > 0))
    images = np.concatenate([fresh, fresh[[4, 9]], noisy, np.zeros((2, 5, 64, 64), np.uint8)])
    found, n = audit(store_of(tmp_path/'store', images), training, held_out, QUICK, progress=False), len(fresh)
    assert found.images.repeats.iloc[n:].tolist() == [4, 9, 20, 21, 22, -1, n + 5] and found.images.same_as.iloc[n:].tolist() == [4, 9, -1, -1, -1, -1, n + 5]
    assert (found.images.repeats.iloc[:n] == -1).all() and not next(c for c in found.criteria if c.name == 'duplicates').passed
    assert found.images.dropped.iloc[n:].tolist() == [True] * 5 + [False, True] and found.images.nearest.iloc[-1] == -1 and not found.images.too_close.iloc[-2:].any()

# An honest store

def test_honest_stores_fail_no_more_often_than_is_said(tmp_path):
    "Training, held-out and other subjects by lot; the others' slices are the images of a generator that knows nothing of the training subjects."
    failed, covered, shares, repetitions = [], [], [], 16
    for seed in range(repetitions):
        training, held_out, others = split_by_lot(seed, 18, 10, 8)
        found = audit(store_of(tmp_path/f'{seed}', others[:][::2]), training, held_out, QUICK.model_copy(update={'seed': seed}), progress=False)
        failed += [c.name for c in found.criteria if not c.passed][:1]
        shares.append(found.images.too_close.mean())
        areas = found.attacks.query("measure == 'auc' and view == 'whole'")
        covered += ((areas.low <= 0.5) & (areas.high >= 0.5)).tolist()
    assert len(failed) <= stats.binom.ppf(0.999, repetitions, QUICK.chance), failed
    assert np.mean(covered) > 0.8 and np.mean(shares) < 0.03, (np.mean(covered), np.mean(shares))

# An over-fitted generator

def test_an_over_fitted_diffusion_model_is_told_by_membership(tmp_path):
    "26 slices of five simulated subjects, learnt by heart in about twenty seconds of one core: no copies yet, and an attacker tells its members from others."
    store = example_store(resolution=16, subjects=12, seed=4)
    training, held_out = (part.select(np.arange(len(part)) % 5 == 0) for part in (store.where(subject=store.subjects[:5]), store.where(subject=store.subjects[5:])))
    params = DiffusionParams(process='edm', channels=48, multipliers=(1,), blocks=1, attention=(), patch=2, coordinates=True, gated=True, learning_rate=4e-3, warmup=0.05, decay='cosine', sampler='dpm_solver',
                             sampling_steps=12, training={'kimg': 12, 'batch_size': 32, 'device': 'cpu', 'clip': 1., 'ema_kimg': 1, 'precision': 'fp32'})
    generator = build_generator(params, 16, 0)
    train(generator, [training], params.training, tmp_path/'training', 0, progress=False)
    load_weights(generator.averaged, tmp_path/'training')
    samples = sample_store(generator, tmp_path/'samples', 200, 0, {'spacing': store.meta['spacing'], 'simulated': True}, progress=False)
    found = audit(samples, training, held_out, AuditParams(percentile=95), progress=False)
    area = found.attacks.query("attack == 'ratio' and view == 'whole' and measure == 'auc'").iloc[0]
    assert area.value > 0.7 and area.low > 0.55, area
    verdict = next(c for c in found.criteria if c.name == 'membership')
    assert not found.passed and not verdict.passed and 'tells training subjects from others' in verdict.reason
    assert not (found.subjects.score < found.subjects.score.max() - 5).any() and (found.subjects.excess > 0).any()

# The command

@pytest.fixture(scope='module')
def prepared(tmp_path_factory) -> Path:
    "A folder with the run of prepared simulated subjects in two splits, an honest store, and one with copies and duplicates."
    folder = tmp_path_factory.mktemp('gate')
    store = example_store(resolution=64, subjects=24)
    fresh = example_store(resolution=64, subjects=8, seed=1)[::2]
    training = store.where(split='train')
    store_of(folder/'honest', fresh)
    store_of(folder/'copies', np.concatenate([fresh, training[np.linspace(3, len(training) - 4, 6).astype(int)], fresh[30:34]]))
    (folder/'audit.yaml').write_text('replicates: 100\npermutations: 399\n')
    (folder/'real').symlink_to(store.path.resolve())
    return folder

def command(prepared: Path, store: str, *more) -> int: return main(['audit', str(prepared/store), '--training', str(prepared/'real'), '--params', str(prepared/'audit.yaml'), *map(str, more)])

def test_the_command_passes_fails_and_reports(prepared, tmp_path, capsys):
    assert command(prepared, 'honest', '--out', tmp_path/'pass') == 0 and command(prepared, 'copies', '--out', tmp_path/'fail') == 3
    said = capsys.readouterr().out
    assert 'verdict: pass' in said and 'verdict: fail' in said and 'FAIL  copies: 6 of' in said and str(tmp_path/'fail'/'audit.html') in said
    for name, verdict in (('pass', 'pass'), ('fail', 'fail')):
        out = tmp_path/name
        record = AuditRecord.model_validate_json((out/'audit.json').read_text())
        raw = json.loads((out/'audit.json').read_text())
        assert raw['verdict'] == verdict and raw['simulated'] and record.synthetic.fingerprint == SliceStore.open(prepared/('honest' if name == 'pass' else 'copies')).fingerprint and raw['made']['commit'] and record.params.seed == 0
        assert record.training.subjects == 18 and record.held_out.subjects == 6 and set(AuditRecord.model_json_schema()['required']) <= set(raw) and 'NaN' not in (out/'audit.json').read_text()
        assert 'SIM_0' not in (out/'audit.json').read_text()        # it may accompany the store
        cells = json.loads((out/'audit.ipynb').read_text())['cells']
        outputs = [o for c in cells for o in c.get('outputs', [])]
        assert sum(bool({'image/png', 'image/svg+xml'} & set(o.get('data', {}))) for o in outputs) >= 3 and not any(o['output_type'] == 'error' for o in outputs)
        assert f'# {verdict.upper()}' in str(outputs) and 'SIMULATED' in str(outputs) and 'data:image/png;base64' in (out/'audit.html').read_text()
        images = pd.read_csv(out/'images.csv')
        assert len(images) == record.synthetic.images and set(images.seed) == {7} and images.number.tolist() == list(range(len(images))) and {'image', 'nearest', 'correlation', 'score', 'too_close', 'copied', 'repeats', 'dropped'} <= set(images)
        assert len(pd.read_csv(out/'subjects.csv')) == 18 and len(pd.read_csv(out/'attacks.csv')) == 30
    assert pd.read_csv(tmp_path/'fail'/'images.csv').copied.iloc[-10:].tolist() == [True] * 6 + [False] * 4
    assert load(Audit, tmp_path/'fail'/'audit.yaml').audit.replicates == 100

@pytest.mark.parametrize('more, code, words', [
    (('--training', 'nowhere'), 1, 'nowhere: no such folder'),
    (('--heldout-split', 'train'), 1, 'is among the training and the held-out subjects'),
    (('--training-split', 'validation'), 1, "no slices of split 'validation'"),
    (('--params', 'PARAMS'), 2, "audit.percentle: unknown key; did you mean 'percentile'?"),
    (('--utility', 'nowhere.yaml'), 2, 'nowhere.yaml: cannot be read'),
])
def test_what_cannot_be_audited_is_one_line(prepared, tmp_path, capsys, more, code, words):
    (tmp_path/'params.yaml').write_text('percentle: 90\n')
    assert command(prepared, 'honest', '--out', tmp_path/'out', *[str(tmp_path/'params.yaml') if m == 'PARAMS' else m for m in more]) == code
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and words in said.err and not (tmp_path/'out'/'audit.json').exists()

def test_too_few_subjects_are_unusable(prepared, tmp_path, capsys):
    store = example_store(resolution=64, subjects=24)
    few = store.where(subject=store.where(split='train').subjects[:2] + store.where(split='test').subjects[:2])
    with StoreWriter(tmp_path/'few', {**{k: store.meta[k] for k in ('resolution', 'spacing', 'simulated')}}) as writer:
        writer.append('all', few[:], few.slices.to_dict('records')); writer.finish()
    assert main(['audit', str(prepared/'honest'), '--training', str(tmp_path/'few'), '--out', str(tmp_path/'out')]) == 1
    assert 'too few' in capsys.readouterr().err

def test_it_says_beforehand_what_it_will_take(prepared, tmp_path, capsys):
    assert command(prepared, 'honest', '--out', tmp_path/'out', '--plan') == 0
    assert 'hours in all' in capsys.readouterr().out and not (tmp_path/'out').exists()

def test_drop_removes_what_it_names_and_nothing_else(prepared, tmp_path, capsys):
    assert command(prepared, 'copies', '--out', tmp_path/'out', '--drop', tmp_path/'kept') in (0, 3)
    before, kept = SliceStore.open(prepared/'copies'), SliceStore.open(tmp_path/'kept')
    images = pd.read_csv(tmp_path/'out'/'images.csv')
    left = np.flatnonzero(~images.dropped)
    assert images.dropped.iloc[-10:].all() and (images.dropped == (images.too_close | (images.repeats >= 0))).all()
    assert kept.slices.number.tolist() == left.tolist() and np.array_equal(kept[:], before[left]) and set(kept.slices.seed) == {7}
    assert kept.meta['dropped']['of'] == before.fingerprint and kept.meta['dropped']['images'] == len(before) - len(kept) and kept.meta['generator_name'] == 'simulated'
    record = AuditRecord.model_validate_json((tmp_path/'out'/'audit.json').read_text())
    assert record.result.verdict == 'fail' and record.verdict == record.after.verdict and record.released.fingerprint == kept.fingerprint and record.dropped['copies'] == 6
    assert all(c.passed for c in record.after.criteria if c.name != 'membership') and record.after.counts['images'] == 0
    alone = audit(kept, *(SliceStore.open(prepared/'real').where(split=s) for s in ('train', 'test')), record.params, progress=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'out'/'after-attacks.csv'), alone.attacks, rtol=1e-12)     # that of an audit which knows of no other
    capsys.readouterr()
    assert command(prepared, 'copies', '--out', tmp_path/'out', '--drop', prepared/'honest') == 1 and 'exists already and is another store' in capsys.readouterr().err

def test_utility_is_measured_before_and_after(tmp_path, monkeypatch):
    monkeypatch.setenv('SYNTHMR_HOME', str(tmp_path/'artifacts'))
    data = {'dataset': 'gate', 'simulated': {'subjects': 10, 'spacing': 4, 'seed': 2}, 'resolution': 32, 'test_share': 0.4}
    segmenter = {'levels': 3, 'filters': 8, 'optimiser': 'adamw', 'learning_rate': 0.01, 'validate_every': 0.25, 'training': {'kimg': 0.5, 'batch_size': 16, 'device': 'cpu'}}
    real = make_data(DataRun.model_validate(data))
    training = real.where(split='train')
    store_of(tmp_path/'store', np.concatenate([example_store(resolution=32, subjects=8, seed=1)[::2], training[[5, 40, 70, 90]]]))
    for name, content in (('unet', {'data': data, 'segmenter': segmenter}), ('other', {'data': {**data, 'dataset': 'gate2', 'test_share': 0.5}, 'segmenter': segmenter}), ('audit', {'percentile': 98, 'replicates': 50, 'permutations': 99})):
        (tmp_path/f'{name}.yaml').write_text(yaml.safe_dump(content))
    def gate(unet, out): return main(['audit', str(tmp_path/'store'), '--training', str(real.path), '--params', str(tmp_path/'audit.yaml'), '--out', str(tmp_path/out), '--drop', str(tmp_path/'kept'), '--utility', str(tmp_path/unet)])
    assert gate('unet.yaml', 'out') in (0, 3)
    rows = pd.read_csv(tmp_path/'out'/'utility.csv')
    assert set(zip(rows.store, rows.metric)) == {('real', 'dice'), *((s, m) for s in ('before', 'after') for m in ('dice', 'relative_dice', 'frechet_distance'))} and (rows[rows.metric == 'frechet_distance'].value > 0).all()
    assert AuditRecord.model_validate_json((tmp_path/'out'/'audit.json').read_text()).utility
    page = (tmp_path/'out'/'audit.html').read_text()
    assert 'relative_dice' in page and 'frechet_distance' in page and page.count('<img alt') >= 4
    assert len([p for p in (tmp_path/'artifacts'/'gate').glob('unet-store-*')]) == 2 and len(list((tmp_path/'artifacts'/'gate').glob('unet-real-*'))) == 1
    make_data(DataRun.model_validate({**data, 'dataset': 'gate2', 'test_share': 0.5}))
    assert gate('other.yaml', 'out2') == 1

# What a long audit needs

def test_a_killed_audit_goes_on_where_it_was(sets, tmp_path, monkeypatch):
    training, held_out, others = sets
    store, params, done = store_of(tmp_path/'store', others[:][::2]), QUICK.model_copy(update={'chunk': 60}), []
    def killed(*a, **kw):
        if len(done) == 4: raise KeyboardInterrupt
        done.append(len(a[0])); return nearest(*a, **kw)
    monkeypatch.setattr(synthmr.privacy.searches, 'nearest', killed)
    with pytest.raises(KeyboardInterrupt): audit(store, training, held_out, params, Searches(params, tmp_path/'searches', progress=False), progress=False)
    monkeypatch.setattr(synthmr.privacy.searches, 'nearest', lambda *a, **kw: done.append(len(a[0])) or nearest(*a, **kw))
    resumed = audit(store, training, held_out, params, Searches(params, tmp_path/'searches', progress=False), progress=False)
    total, before = len(done), len(list((tmp_path/'searches').iterdir()))
    assert total == before      # every part once
    stricter = params.model_copy(update={'percentile': 95})
    assert audit(store, training, held_out, stricter, Searches(stricter, tmp_path/'searches', progress=False), progress=False).images.too_close.sum() >= resumed.images.too_close.sum()
    assert len(done) == total   # another threshold needs no search
    whole = audit(store, training, held_out, QUICK, progress=False)
    pd.testing.assert_frame_equal(resumed.images, whole.images, check_exact=True); pd.testing.assert_frame_equal(resumed.attacks, whole.attacks, check_exact=True)

@pytest.mark.parametrize('seed', range(3))
def test_what_is_left_is_audited_as_if_it_had_always_been_so(sets, tmp_path, seed):
    training, held_out, others = sets
    store, rng = store_of(tmp_path/'store', others[:][::3]), np.random.default_rng(seed)
    kept = rng.random(len(store)) > (0.05, 0.5, 0.9)[seed]
    after = store_of(tmp_path/'after', store[np.flatnonzero(kept)])
    params = QUICK.model_copy(update={'squares': (0, 8, 0)[seed], 'chunk': 200})
    search = Searches(params, tmp_path/'searches', progress=False)
    audit(store, training, held_out, params, search, progress=False)
    narrowed, afresh = audit(after, training, held_out, params, Narrowed(search, store, kept, after), progress=False), audit(after, training, held_out, params, progress=False)
    for name in ('images', 'attacks', 'subjects', 'baseline'): pd.testing.assert_frame_equal(getattr(narrowed, name), getattr(afresh, name), check_exact=True)

MEMORY = """
import sys, threading, time, torch
from synthmr.privacy.audit import AuditParams, audit
from synthmr.slices import SliceStore
torch.set_num_threads(1)
synthetic, training, held_out = (SliceStore.open(f'{sys.argv[1]}/{name}') for name in ('synthetic', 'training', 'held_out'))
params = AuditParams(memory=float(sys.argv[2]), flips=False, replicates=20, permutations=59)
def anonymous(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) * 1024
before, peak, done = anonymous(), [0], []
def watch():
    while not done: peak[0] = max(peak[0], anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
audit(synthetic, training, held_out, params, progress=False)
done.append(1); thread.join(); print(peak[0] - before)
"""

@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_is_bounded_at_the_paper_s_size(tmp_path):
    "190 MB of slices of 5x256x256; what is held is what a search may hold, and tables."
    rng = np.random.default_rng(0)
    grey = [rng.integers(0, 256, (5, 16, 16), np.uint8) for _ in range(12)]
    for name, subjects, slices in (('training', range(6), 50), ('held_out', range(6, 10), 40), ('synthetic', range(3), 40)):
        with StoreWriter(tmp_path/name, {'resolution': 256, 'spacing': [1, 1, 1], 'simulated': True}) as writer:
            for s in subjects:
                images = np.stack([np.roll(grey[s], k, (1, 2)) for k in range(slices)]).repeat(16, 2).repeat(16, 3)
                images[:, :, ::3] //= 2; images[np.arange(slices), :, np.arange(slices)] = 255
                writer.append(f'{s}', images, [dict(subject=f's{s}', z=k, split='train', tumour=1) for k in range(slices)])
            writer.finish()
    done = subprocess.run([sys.executable, '-c', MEMORY, tmp_path, '60e6'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert int(done.stdout) < 160e6       # the bound, twice for products that are let go late, and the interpreter's modules
