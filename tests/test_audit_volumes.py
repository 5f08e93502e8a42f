"The release gate on volumes of simulated brains: honest volumes pass, planted copies fail and name whose they are, what serves slices only refuses in one line."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from synthmr.cli import main
from synthmr.params import load
from synthmr.privacy.audit import AuditParams, audit
from synthmr.privacy.gate import Audit, AuditRecord, carry_out
from synthmr.privacy.volumes import open_images
from synthmr.ventricles.anatomy import BrainsParams, simulate_brains
from synthmr.ventricles.volumes import VolumeStore, VolumeWriter

PARAMS = AuditParams(percentile=95, replicates=100, permutations=399)   # twenty held-out people know no higher percentile

def grey(curve):
    "A copy whose T1w has gone through a curve."
    def f(volume):
        out = volume.copy()
        out[0] = np.clip(np.round(curve(out[0].astype(float))), 0, 255)
        return out
    return f

ALTERED = {
    'exact': lambda v: v,
    'mirrored': lambda v: v[..., ::-1],
    'gain and offset': grey(lambda v: 0.6 * v + 15),
    'gamma 0.6': grey(lambda v: 255 * (v / 255)**0.6),
    'gamma 1.7, mirrored': lambda v: grey(lambda v: 255 * (v / 255)**1.7)(v)[..., ::-1],
    'noisy': grey(lambda v: v + np.random.default_rng(0).normal(0, 10, v.shape) * (v > 0)),
}

def store_of(path: Path, volumes: np.ndarray, rows: list[dict], **meta) -> Path:
    "Volumes as a store."
    with VolumeWriter(path, {'shape': list(volumes.shape[2:]), 'spacing': 8, 'simulated': True, **meta}) as writer:
        writer.append('all', np.ascontiguousarray(volumes), rows); writer.finish()
    return path

@pytest.fixture(scope='module')
def made(tmp_path_factory) -> tuple[Path, np.ndarray, np.ndarray]:
    "A folder with a store of 40 training and 20 held-out brains and an honest one of 24 others; training brains, others."
    folder = tmp_path_factory.mktemp('volumes')
    brains = simulate_brains(folder/'brains', BrainsParams(train=64, normal=20, test=1, seed=1, spacing=8, shape=(16, 24, 16), workers=0), progress=False)
    training, others, held_out = brains[:40], brains[40:64], brains[64:84]
    store_of(folder/'real', np.concatenate([training, held_out]), [dict(subject=f'P{i:03d}', split='train' if i < 40 else 'normal', ml=20.) for i in range(60)])
    synthetic(folder/'honest', others)
    (folder/'audit.yaml').write_text('percentile: 95\nreplicates: 100\npermutations: 399\n')
    return folder, training, others

def synthetic(path: Path, volumes: np.ndarray, **meta) -> Path: return store_of(path, volumes, [dict(number=i, split='train', asked=20., ml=20.) for i in range(len(volumes))], **meta)
def sets(folder: Path, name: str): real = open_images(folder/'real'); return open_images(folder/name), real.where(split='train'), real.where(split='normal')

def test_other_people_s_volumes_pass(made):
    found = audit(*sets(made[0], 'honest'), PARAMS, progress=False)
    assert found.passed and not found.images.copied.any() and (found.images.repeats < 0).all() and found.false_repeats == (0, 20), found.table
    assert list(found.calibration.centre.index) == ['whole', 'T1w', 'classes'] and set(found.attacks['view']) == {'whole', 'T1w', 'classes'}
    assert np.isfinite(found.attacks[found.attacks.measure == 'auc'].detectable).all()
    assert 'for a true positive rate at 0.01 held-out volumes are too few' in found.criteria[2].reason and 'among 12 attempts' in found.criteria[2].reason

def test_an_honest_store_hardly_ever_fails(made):
    "The same people, divided anew: by the chance that was asked for few of twelve stores fail, and none holds a copy."
    volumes, failed, highest = open_images(made[0]/'brains'), 0, []
    for seed in range(12):
        part = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2, 3], [40, 20, 24, 1]))
        found = audit(*(volumes.select(part == k) for k in (2, 0, 1)), PARAMS.model_copy(update={'seed': seed, 'replicates': 20}), progress=False)
        failed += not found.passed; highest.append(found.images.score.max() / found.threshold)
    assert failed <= 3 and max(highest) < 0.6 and np.median(highest) < 0.3, (failed, highest)

def test_planted_copies_fail_and_are_named(made, tmp_path):
    folder, training, others = made
    copies = np.stack([f(training[5 * k + 2]) for k, f in enumerate(ALTERED.values())])
    synthetic(tmp_path/'store', np.concatenate([others, copies, others[3:4]]))
    real = sets(folder, 'honest')[1:]
    found = audit(open_images(tmp_path/'store'), *real, PARAMS, progress=False)
    planted = found.images.iloc[24:30]
    assert not found.passed and planted.copied.all() and not found.images.copied.drop(planted.index).any(), found.images[['score', 'copied']]
    assert planted.subject.tolist() == [f'P{5 * k + 2:03d}' for k in range(6)] and set(found.subjects[found.subjects.copies > 0].subject) == set(planted.subject)
    assert planted.transformation.tolist() == ['none', 'flip', 'none', 'none', 'flip', 'none'] and found.images.repeats.iloc[30] == 3
    assert 'volumes' in found.subjects and 'z' not in found.images and '6 of 31 synthetic volumes are copies of training volumes' in found.criteria[0].reason
    without_flips = audit(open_images(tmp_path/'store'), *real, PARAMS.model_copy(update={'flips': False}), progress=False)
    assert without_flips.images.copied.iloc[24:30].tolist() == [True, False, True, True, False, True]

def test_a_mask_is_copied_alone(made, tmp_path):
    "The grey values of somebody else in the tissue classes of a training volume, and the reverse: each half is found by its own view."
    folder, training, others = made
    half = others[:2].copy()
    half[0, 1], half[1, 0] = training[7, 1], training[8, 0]
    synthetic(tmp_path/'store', np.concatenate([half, others[2:]]))
    rows = audit(open_images(tmp_path/'store'), *sets(folder, 'honest')[1:], PARAMS, progress=False).images
    assert rows.copied.tolist() == [True] * 2 + [False] * 22 and rows['view'].iloc[:2].tolist() == ['classes', 'T1w'] and rows.subject.iloc[:2].tolist() == ['P007', 'P008']

def test_bounds_precision_and_memory_change_nothing(made):
    "Rows of a volume are those of all planes: what a search cuts them into makes no difference."
    plain = audit(*sets(made[0], 'honest'), PARAMS, progress=False)
    for differs in ({'squares': 8}, {'precision': 'bf16'}, {'memory': 1e6}):
        other = audit(*sets(made[0], 'honest'), PARAMS.model_copy(update=differs), progress=False)
        pd.testing.assert_frame_equal(other.images, plain.images, check_exact=True); pd.testing.assert_frame_equal(other.attacks, plain.attacks, check_exact=True)

# The command

def command(folder: Path, store: Path, *more) -> int: return main(['audit', str(store), '--training', str(folder/'real'), '--params', str(folder/'audit.yaml'), *map(str, more)])

def test_the_command_passes_and_fails_and_reports(made, tmp_path, capsys):
    folder, training, others = made
    synthetic(tmp_path/'copies', np.concatenate([others, training[[5, 9]], others[3:4]]))
    assert command(folder, folder/'honest', '--heldout-split', 'normal', '--out', tmp_path/'pass') == 0 and command(folder, tmp_path/'copies', '--out', tmp_path/'fail') == 3
    said = capsys.readouterr().out
    assert 'honest: 24 volumes, SIMULATED patients' in said and 'verdict: pass' in said and 'FAIL  copies: 2 of 27 synthetic volumes are copies of training volumes' in said and 'verdict: fail' in said
    record = AuditRecord.model_validate_json((tmp_path/'fail'/'audit.json').read_text())
    assert record.unit == 'volume' and record.params.views == ('whole', 'T1w', 'classes') and record.result.verdict == 'fail' and record.training.subjects == 40 and record.held_out.subjects == 20 and record.result.counts['duplicates'] == 1
    assert 'P005' not in (tmp_path/'fail'/'audit.json').read_text() and pd.read_csv(tmp_path/'fail'/'images.csv').subject.iloc[24:26].tolist() == ['P005', 'P009'] and load(Audit, tmp_path/'fail'/'audit.yaml').audit.percentile == 95
    for name, figures in (('pass', 3), ('fail', 4)):        # the fourth shows the duplicate
        outputs = [o for c in json.loads((tmp_path/name/'audit.ipynb').read_text())['cells'] for o in c.get('outputs', [])]
        assert sum(bool({'image/png', 'image/svg+xml'} & set(o.get('data', {}))) for o in outputs) == figures and not any(o['output_type'] == 'error' for o in outputs)
    assert command(folder, folder/'honest', '--out', tmp_path/'none', '--plan') == 0 and 'hours in all' in capsys.readouterr().out and not (tmp_path/'none').exists()

def test_drop_removes_what_it_names_and_nothing_else(made, tmp_path):
    folder, training, others = made
    synthetic(tmp_path/'copies', np.concatenate([others, training[[5, 9]], others[3:4]]), synthetic={'made': 'here'})
    run = Audit(synthetic=str(tmp_path/'copies'), training=str(folder/'real'), out=str(tmp_path/'out'), drop=str(tmp_path/'kept'), audit=PARAMS)
    outcome = carry_out(run, progress=False)
    before, kept, left = VolumeStore.open(tmp_path/'copies'), VolumeStore.open(tmp_path/'kept'), np.flatnonzero(~outcome.found.images.dropped)
    assert set(range(27)) - set(left) >= {24, 25, 26} and np.array_equal(kept[:], before[left]) and kept.slices.number.tolist() == left.tolist() and len(kept) > 20
    assert kept.meta['synthetic'] == {'made': 'here'} and kept.meta['dropped']['copies'] == 2 and kept.meta['dropped']['of'] == before.fingerprint
    assert not outcome.found.passed and outcome.record.verdict == outcome.record.after.verdict == 'pass' and outcome.record.released.fingerprint == kept.fingerprint
    alone = audit(*sets(folder, tmp_path/'kept'), PARAMS, progress=False)
    pd.testing.assert_frame_equal(outcome.after.images, alone.images, check_exact=True); pd.testing.assert_frame_equal(outcome.after.attacks, alone.attacks, check_exact=True)
    assert carry_out(run, progress=False).kept.fingerprint == kept.fingerprint       # what is there is taken

def test_what_cannot_be_audited_or_released_is_one_line(made, tmp_path, capsys):
    folder, training, others = made
    flat = others.transpose(0, 1, 3, 2, 4)                   # as many voxels, as many columns
    synthetic(tmp_path/'flat', flat), synthetic(tmp_path/'finer', others, spacing=4)
    segmenter = Path(__file__).resolve().parents[1]/'params'/'demo'/'unet.yaml'
    (tmp_path/'views.yaml').write_text('percentile: 95\nviews: [whole, FLAIR]\n'); (tmp_path/'strict.yaml').write_text('percentile: 99\n')
    for store, more, words in ((tmp_path/'flat', (), 'flat: synthetic images are (2, 24, 16, 16), training images (2, 16, 24, 16)'), (tmp_path/'finer', (), 'finer: synthetic volumes have voxels of 4 mm, training volumes of 8 mm'),
                               (folder/'honest', ('--heldout-split', 'test'), "no volumes of split 'test'"), (folder/'honest', ('--utility', segmenter), 'honest: holds volumes'), (folder/'honest', ('--training', folder/'honest'), 'no volumes of split \'normal\''),
                               (folder/'honest', ('--params', tmp_path/'views.yaml'), "real: its images have no view 'FLAIR'"), (folder/'honest', ('--params', tmp_path/'strict.yaml'), '20 held-out volumes are too few for a percentile of 99; 100 are needed, or a percentile of at most 95')):
        assert command(folder, store, '--out', tmp_path/'out', *more) == 1
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and words in said, said
    (tmp_path/'audit.json').write_text('{}')
    assert main(['release', str(folder/'honest'), str(tmp_path/'release'), '--audit', str(tmp_path/'audit.json'), '--licence', 'CC-BY-4.0']) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"{folder/'honest'}: holds volumes, not slices" in said and not (tmp_path/'release').exists()
