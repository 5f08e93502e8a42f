"3D metrics against the authors' own numbers, against MONAI, and by the rule for empty masks."
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from scipy.ndimage import uniform_filter

from synthmr.metrics.overlap import dice, evaluate_volume, hausdorff, mean_over_classes, mean_over_subjects, to_volume

ROWS = ('dice', 'precision', 'recall', 'true_count', 'pred_count', 'tp', 'fp', 'fn', 'hausdorff_distance', 'average_surface_distance')
COLUMNS = (('dice', 'dice'), ('hausdorff', 'hausdorff_distance'), ('true_voxels', 'true_count'), ('pred_voxels', 'pred_count'))
SHAPE = (13, 17, 15)

# The authors' code

@pytest.mark.parametrize('true, pred, out', [('in.true1', 'in.pred1', 'out.metrics1'),
                                             ('in.true2_class3_absent_in_pred', 'in.pred2_class3_absent_in_pred', 'out.metrics2')])
def test_the_paper_rule_is_the_authors_code(shared, true, pred, out):
    golden = load_file(shared/'goldens'/'pixelwise_metrics.safetensors')
    expected = dict(zip(ROWS, golden[out]))
    found = evaluate_volume(golden[true], golden[pred], rule='paper')
    for column, row in COLUMNS: np.testing.assert_allclose(found[column], expected[row][:3], rtol=0, atol=1e-6, err_msg=row)
    for column, row in COLUMNS[2:]: np.testing.assert_allclose(found[column].mean(), expected[row][3], rtol=0, atol=1e-6, err_msg=row)
    means = mean_over_classes(found.assign(subject='A')).set_index('metric')['mean']                 # over the classes that are defined
    for column, row in COLUMNS[:2]: np.testing.assert_allclose(means[column], expected[row][3], rtol=0, atol=1e-6, err_msg=row)
    whole = golden[true] > 0, golden[pred] > 0
    foreground = dice(*whole), hausdorff(*whole), whole[0].sum(), whole[1].sum()
    np.testing.assert_allclose(foreground, [expected[row][4] for _, row in COLUMNS], rtol=0, atol=1e-6)

def test_the_golden_holds_an_undefined_case(shared):
    "The rule for empty masks is only tested if there is one."
    values = json.loads((shared/'goldens'/'pixelwise_metrics.json').read_text())['values']['case2']
    assert values[ROWS.index('hausdorff_distance')][2] is None and values[0][2] == 0

# MONAI

def blob(seed: int, threshold: float=0.1) -> np.ndarray:
    "A random smooth mask."
    return uniform_filter(np.random.default_rng(seed).normal(size=SHAPE), 5, mode='constant') * 11 > threshold

def voxel(*where: int) -> np.ndarray:
    "A mask of a single voxel."
    mask = np.zeros(SHAPE, bool); mask[where] = True
    return mask

CASES = {'blobs': (blob(1), blob(2)), 'sparse': (blob(3, 1.5), blob(4, -0.5)), 'all of the volume': (np.ones(SHAPE, bool), blob(5)),
         'one voxel': (voxel(6, 8, 7), blob(6)), 'corner': (voxel(0, 0, 0), voxel(12, 16, 14)), 'same': (blob(7), blob(7)), 'far speck': (blob(8) & (np.arange(15) > 9), voxel(3, 0, 0))}

@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('spacing', [(1.0, 1.0, 1.0), (3.0, 0.8, 1.3), (5.0, 1.0, 1.0)], ids=str)     # MONAI refuses a mixture of int and float
@pytest.mark.parametrize('percentile', [100, 95, 50])
def test_equal_to_monai(name, spacing, percentile):
    torch, metrics = pytest.importorskip('torch'), pytest.importorskip('monai.metrics')
    a, b = CASES[name]
    one, two = (torch.from_numpy(m)[None, None].float() for m in (a, b))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')     # MONAI warns of its own calls
        expected = metrics.compute_hausdorff_distance(two, one, include_background=True, spacing=spacing, percentile=percentile).item()
        assert dice(a, b) == pytest.approx(metrics.compute_dice(two, one).item(), rel=1e-6)
    assert hausdorff(a, b, spacing, percentile) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert hausdorff(a, b, spacing, percentile) == hausdorff(b, a, spacing, percentile)

def test_pruning_never_loses_the_farthest_point():
    "Against all distances between all surface points, at many densities and voxel sizes."
    rng = np.random.default_rng(0)
    for i in range(40):
        spacing = rng.uniform(0.3, 6, 3)
        a, b = (rng.random(SHAPE) < rng.choice([0.002, 0.02, 0.2, 0.9]) for _ in range(2))
        a[tuple(rng.integers(0, SHAPE))] = b[tuple(rng.integers(0, SHAPE))] = True
        distances = np.linalg.norm((surface_slowly(a)[:, None] - surface_slowly(b)) * spacing, axis=2)
        assert hausdorff(a, b, spacing) == pytest.approx(max(distances.min(0).max(), distances.min(1).max()), rel=1e-12), i

def surface_slowly(mask: np.ndarray) -> np.ndarray:
    "Positions of the voxels of which one of six neighbours, or the outside of the volume, is not in the mask."
    padded = np.pad(mask, 1)
    return np.argwhere(mask & ~np.all([np.roll(padded, s, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for s in (-1, 1)], axis=0))

# Rules

EMPTY, FULL = np.zeros((4, 6, 8), np.uint8), np.full((4, 6, 8), 3, np.uint8)
DIAGONAL = float(np.linalg.norm([4 * 2.5, 6, 8]))

@pytest.mark.parametrize('true, pred, rule, expected, why', [
    (FULL, EMPTY, 'paper', (0, np.nan), 'hausdorff: annotated, not predicted'), (EMPTY, FULL, 'paper', (0, np.nan), 'hausdorff: predicted, not annotated'),
    (EMPTY, EMPTY, 'paper', (np.nan, np.nan), 'dice and hausdorff: in neither'), (FULL, FULL, 'paper', (1, 0), ''),
    (FULL, EMPTY, 'strict', (0, DIAGONAL), ''), (EMPTY, FULL, 'strict', (0, DIAGONAL), ''), (EMPTY, EMPTY, 'strict', (1, 0), ''), (FULL, FULL, 'strict', (1, 0), '')])
def test_every_case_of_an_absent_class(true, pred, rule, expected, why):
    row = evaluate_volume(true, pred, (2.5, 1, 1), rule).set_index('class').loc['ET']
    np.testing.assert_allclose([row.dice, row.hausdorff], expected)
    assert row.undefined == why

def test_every_nan_is_explained_and_counted():
    rows = pd.concat([evaluate_volume(t, p).assign(subject=i) for i, (t, p) in enumerate([(FULL, EMPTY), (FULL, FULL), (EMPTY, EMPTY)])])
    assert ((rows.dice.isna() | rows.hausdorff.isna()) == (rows.undefined != '')).all()
    table = mean_over_subjects(rows).set_index(['class', 'metric'])
    assert table.loc[('ET', 'dice'), ['mean', 'n', 'n_undefined']].tolist() == [0.5, 2, 1]
    assert table.loc[('ET', 'hausdorff'), ['mean', 'n', 'n_undefined']].tolist() == [0, 1, 2]
    assert (table['mean'].isna() == (table.undefined != '')).all() and (table.n + table.n_undefined == [3]*6 + [9]*2).all()

def test_the_order_of_subjects_does_not_matter():
    rng = np.random.default_rng(0)
    rows = pd.concat([evaluate_volume(*rng.integers(0, 4, (2, 5, 6, 7))).assign(subject=i) for i in range(6)])
    table = mean_over_subjects(rows)
    assert table['class'].tolist() == ['NCR/NET', 'ED', 'ET']*2 + ['mean']*2
    for seed in range(3): pd.testing.assert_frame_equal(mean_over_subjects(rows.sample(frac=1, random_state=seed)), table)
    overall = table[(table['class'] == 'mean') & (table.metric == 'dice')]['mean'].item()
    assert overall == pytest.approx(rows.dice.mean()) == pytest.approx(mean_over_classes(rows).query('metric == "dice"')['mean'].mean())

# Refusals

@pytest.mark.parametrize('call, message', [
    (lambda: evaluate_volume(np.zeros((2, 3, 3), int), np.zeros((3, 3, 3), int)), 'different shape'),
    (lambda: evaluate_volume(EMPTY, EMPTY + 4), r'segmentation: class indices are 0 to 3, not \[4\]'),
    (lambda: evaluate_volume(EMPTY.astype(float), EMPTY.astype(float)), 'annotation: class indices'),
    (lambda: evaluate_volume(EMPTY, EMPTY, rule='lenient'), 'rule is one of'),
    (lambda: hausdorff(EMPTY, EMPTY), 'must be boolean'),
    (lambda: hausdorff(EMPTY > 0, EMPTY > 0, (1, 0, 1)), 'positive voxel sizes'),
    (lambda: mean_over_subjects(pd.concat([evaluate_volume(FULL, FULL).assign(subject='A')]*2)), 'subject A, class NCR/NET stands more than once'),
    (lambda: mean_over_subjects(evaluate_volume(FULL, FULL)), "need a column 'subject'"),
    (lambda: to_volume(EMPTY, [0, 1, 1, 2]), 'z = 1 stands 2 times'), (lambda: to_volume(EMPTY, [0, 1, 2]), '4 slices, but 3 values of z'),
    (lambda: to_volume(EMPTY, [0, 1, np.nan, 2]), 'slice 2 has no place'), (lambda: to_volume(EMPTY, [0, 1, 2, 9], 9), 'z = 9 lies outside a volume of 9'),
    (lambda: to_volume(EMPTY, range(4), fill='full'), 'needs its depth'), (lambda: to_volume(EMPTY, range(4), fill='all'), "'kept' or 'full', not 'all'")])
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message): call()

def test_slices_in_any_order_make_the_same_volume():
    volume = np.random.default_rng(0).integers(0, 4, (9, 5, 4)).astype(np.uint8)
    z = np.random.default_rng(1).permutation(9)[:6]
    assert np.array_equal(to_volume(volume[z], z), volume[np.sort(z)])
    full = to_volume(volume[z], z, 9, 'full')
    assert np.array_equal(full[z], volume[z]) and not np.delete(full, z, axis=0).any() and full.dtype == np.uint8
