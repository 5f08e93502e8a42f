"3D metrics against the authors' own numbers."
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from synthmr.metrics.overlap import dice, evaluate_volume, hausdorff

ROWS = ('dice', 'precision', 'recall', 'true_count', 'pred_count', 'tp', 'fp', 'fn', 'hausdorff_distance', 'average_surface_distance')

@pytest.mark.parametrize('true, predicted, out', [('in.true1', 'in.pred1', 'out.metrics1'),
                                                  ('in.true2_class3_absent_in_pred', 'in.pred2_class3_absent_in_pred', 'out.metrics2')])
def test_the_paper_rule_is_the_authors_code(shared, true, predicted, out):
    golden = load_file(shared/'goldens'/'pixelwise_metrics.safetensors')
    expected = dict(zip(ROWS, golden[out]))
    found = evaluate_volume(golden[true], golden[predicted], rule='paper')
    for column, row in (('dice', 'dice'), ('hausdorff', 'hausdorff_distance'), ('true_voxels', 'true_count'), ('pred_voxels', 'pred_count')):
        assert np.allclose(found[column], expected[row][:3], atol=1e-6, equal_nan=True)
    for column, row in (('dice', 'dice'), ('hausdorff', 'hausdorff_distance')):
        assert np.isclose(found[column].mean(), expected[row][3], atol=1e-6)     # mean over the classes that are defined
    whole = golden[true] > 0, golden[predicted] > 0
    assert np.isclose(dice(*whole), expected['dice'][4], atol=1e-6) and np.isclose(hausdorff(*whole), expected['hausdorff_distance'][4], atol=1e-6)

def test_the_golden_holds_an_undefined_case(shared):
    "The rule for empty masks is only tested if there is one."
    values = json.loads((shared/'goldens'/'pixelwise_metrics.json').read_text())['values']['case2']
    assert values[ROWS.index('hausdorff_distance')][2] is None and values[0][2] == 0

def test_volumes_of_different_shape_are_refused():
    with pytest.raises(ValueError, match='different shape'): evaluate_volume(np.zeros((2, 3, 3), int), np.zeros((3, 3, 3), int))
