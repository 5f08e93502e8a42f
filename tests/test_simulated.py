"The simulated cohort: the same bytes however it is made, whole or not there, plausible."
import json

import nibabel as nib
import numpy as np
import pytest

from synthmr.data.simulated import SEQUENCES, SimulatedParams, simulate_cohort, simulate_subject, subject_name

def contents(folder) -> dict[str, bytes]: return {p.name: p.read_bytes() for p in sorted(folder.rglob('*.nii.gz'))}

def test_the_number_of_processes_changes_no_byte(tmp_path):
    cohorts = []
    for workers in (0, 1, 2):
        simulate_cohort(tmp_path/str(workers), SimulatedParams(subjects=3, spacing=5, workers=workers), progress=False)
        cohorts.append(contents(tmp_path/str(workers)))
    assert len(cohorts[0]) == 15 and cohorts[0] == cohorts[1] == cohorts[2]

def test_a_subject_depends_on_seed_and_number_alone(tmp_path):
    simulate_cohort(tmp_path/'two', SimulatedParams(subjects=2, spacing=5, workers=0), progress=False)
    simulate_cohort(tmp_path/'more', SimulatedParams(subjects=3, spacing=5, workers=0), progress=False)
    two, more = contents(tmp_path/'two'), contents(tmp_path/'more')
    assert two.items() <= more.items()
    assert len({more[f'{subject_name(i)}_t1.nii.gz'] for i in range(3)}) == 3

def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='not empty and not a simulated cohort'): simulate_cohort(tmp_path, SimulatedParams(subjects=1, spacing=5))
    assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']

def test_files_are_like_brats_and_say_that_they_are_simulated(tmp_path):
    folder, = simulate_cohort(tmp_path/'cohort', SimulatedParams(subjects=1, spacing=4, workers=0), progress=False)
    assert sorted(p.name for p in folder.iterdir()) == sorted(f'SIM_00000_{name}.nii.gz' for name in (*SEQUENCES, 'seg'))
    image = nib.load(folder/'SIM_00000_t2.nii.gz')
    assert image.shape == (60, 60, 39) and np.allclose(image.header.get_zooms(), 4) and nib.aff2axcodes(image.affine) == ('L', 'P', 'S')
    assert b'SIMULATED' in image.header['descrip'].item() and json.loads((tmp_path/'cohort'/'simulated.json').read_text())['simulated'] is True
    assert image.get_data_dtype() == np.int16 and nib.load(folder/'SIM_00000_seg.nii.gz').get_data_dtype() == np.uint8

def test_full_size_is_that_of_brats():
    subject = simulate_subject(1, SimulatedParams())
    assert all(volume.shape == (240, 240, 155) for volume in subject.values())
    assert set(np.unique(subject['seg'])) == {0, 1, 2, 4}
    outside = subject['t1'] == 0
    assert outside.mean() > 0.7 and not any(subject[name][outside].any() for name in (*SEQUENCES, 'seg'))

def test_tumours_are_plausible():
    cohort = [simulate_subject(i, SimulatedParams(spacing=4, seed=7)) for i in range(24)]
    ml = np.array([np.bincount(s['seg'].ravel(), minlength=5)[[1, 2, 4]] for s in cohort]) * 0.064
    assert ((ml > 0.1).mean(axis=0) > 0.9).all()                # nearly every tumour shows all classes
    assert (np.median(ml, axis=0) > [2, 15, 2]).all() and (np.median(ml, axis=0) < [60, 120, 60]).all() and ml.sum(1).max() < 450
    enhancing = [s['t1ce'][s['seg'] == 4].mean() / np.median(s['t1ce'][s['t1ce'] > 0]) for s in cohort]
    oedema = [s['flair'][s['seg'] == 2].mean() / np.median(s['flair'][s['flair'] > 0]) for s in cohort]
    assert np.median(enhancing) > 1.5 and np.median(oedema) > 1.3   # bright where a radiologist looks for them
