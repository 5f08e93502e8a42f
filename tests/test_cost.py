"What a study costs, told before it is paid: against trainings that were timed, schedules added up step by step, files that were weighed."
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from synthmr.cli import load_study
from synthmr.generators.families import build_generator
from synthmr.generators.progressive_gan import ProgressiveGANParams, resolution_at
from synthmr.generators.stylegan1 import StyleGAN1Params
from synthmr.generators.stylegan2 import StyleGAN2Params
from synthmr.slices import StoreWriter
from synthmr.studies import cost, measuring, timing
from synthmr.studies.cost import CostError, data_sizes, longest_chain, measurements, plan, run_seconds, store_bytes
from synthmr.studies.measuring import Measurement, MeasuringError, measure, measure_apart
from synthmr.studies.runs import make_data, make_generator, make_segmenter
from synthmr.studies.study import Study, all_runs
from synthmr.training import train

ROOT = Path(__file__).resolve().parents[1]
DATA = {'dataset': 'tiny', 'simulated': {'subjects': 6, 'seed': 3, 'spacing': 4, 'workers': 0}, 'resolution': 32, 'test_share': 0.34, 'workers': 0}
GENERATOR = {'data': DATA, 'images': 200, 'generator': {'kind': 'stylegan2', 'latents': 32, 'width': 32, 'mapping_layers': 2, 'channel_base': 512, 'channel_max': 32, 'training': {'kimg': 2, 'batch_size': 16}}}
SEGMENTER = {'data': DATA, 'segmenter': {'kind': 'unet', 'levels': 3, 'filters': 16, 'optimiser': 'adamw', 'validate_every': 0.5, 'training': {'kimg': 2, 'batch_size': 8}}}
STUDY = {'data': DATA, 'generators': [GENERATOR], 'segmenters': [SEGMENTER], 'augmentation': [True], 'seeds': [0]}
TRAINED = {'weights': 10**8, 'checkpoint': 4 * 10**8, 'memory': 5e9, 'measured': 2, 'part': 8}

def given(wanted: dict[str, Measurement]) -> dict[str, dict]:
    "A table of seconds in place of measurements."
    rates = {timing.report_rates: {'start': 10.}, timing.subject_rates: {'simulate': 4., 'prepare': 2., 'slices': 75, 'nifti': 10**7, 'evaluate': 0.5, 'subject': 'one'},
             timing.generator_rates: {**TRAINED, 'training': 5000., 'sampling': 0.25, 'sampled': 2, 'few': 1, 'steps': 1},
             timing.segmenter_rates: {**TRAINED, 'training': 0.5, 'validation': 0.1, 'segment': 0.1}, timing.evaluation_rates: {'features': [0.1], 'compare': [7.], 'pair': 1e-6}}
    return {name: rates[m.function] for name, m in wanted.items()}

@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    "A folder in which nothing is finished."
    (tmp_path/'params').mkdir(); (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path); monkeypatch.delenv('SYNTHMR_HOME', raising=False)
    return tmp_path

@pytest.fixture
def paper(place, monkeypatch):
    "The paper's studies, read in the repository and planned elsewhere."
    def read(name):
        monkeypatch.chdir(ROOT); study = load_study(Path(f'params/brats2021/{name}.yaml')); monkeypatch.chdir(place)
        return study
    return read

def test_a_plan_holds_for_a_study_that_is_then_carried_out(place):
    "Within a factor of six, for work of half a second on a machine that does other things, too."
    study = Study.model_validate(STUDY)
    found = plan(study, progress=False)
    rates = measure(measurements(study), progress=False)
    runs = {r.report: r for r in reversed(all_runs(study))}      # of the segmenters the one on real images
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    for kind, make in (('prepare', make_data), ('generator', make_generator), ('segmenter', make_segmenter)):
        began = time.perf_counter(); make(runs[kind]); actual = time.perf_counter() - began
        told = run_seconds(runs[kind], rates, found.sizes) - rates['report']['start']
        assert 1/6 < told / actual < 6, (kind, told, actual)
    torch.set_num_threads(threads)
    real = sum(f.stat().st_size for f in runs['prepare'].folder.iterdir())
    sizes = data_sizes(study.data)
    assert sizes.source == 'counted in the prepared store' and abs(sizes.train + sizes.test - (found.sizes.train + found.sizes.test)) <= 0.3 * (sizes.train + sizes.test)
    assert math.isclose(store_bytes(sizes.train + sizes.test, 32), real, rel_tol=0.1)
    samples, weights = runs['generator'].samples/'images.npy', runs['generator'].folder/'training'/'weights.safetensors'
    assert math.isclose(cost.run_bytes(runs['generator'], rates, sizes), samples.stat().st_size + weights.stat().st_size, rel_tol=0.1)

@pytest.mark.parametrize('params', [StyleGAN2Params(latents=64, width=64, channel_base=1024, channel_max=64, training={'kimg': 0.064, 'batch_size': 8, 'checkpoint_every': 0.032, 'keep_checkpoints': True}),
    ProgressiveGANParams(latents=64, channel_base=1024, channel_max=64, growth={'train_kimg': 0.008, 'fade_kimg': 0.008, 'batch_sizes': {}}, training={'kimg': 0.096, 'batch_size': 8, 'checkpoint_every': 0.048, 'keep_checkpoints': True})],
    ids=lambda p: p.kind)
def test_a_checkpoint_weighs_what_was_told(place, params):
    rates = timing.training_rates(build_generator(params, 32, 0), params.training, 32, patience=0.05)
    train(build_generator(params, 32, 0), [timing._store(16, 32)], params.training, place/'training', 0, progress=False)
    last = max(place.glob('training/checkpoint-*'), key=lambda p: int(p.name[11:]))
    assert math.isclose(rates['checkpoint'], sum(f.stat().st_size for f in last.iterdir()), rel_tol=0.1)
    assert math.isclose(rates['weights'], (place/'training'/'weights.safetensors').stat().st_size, rel_tol=0.1)

def test_a_store_weighs_what_was_told(place):
    rows = [{'subject': f's{i // 20}', 'z': i, 'split': 'train', 'tumour': 3} for i in range(200)]
    with StoreWriter(place/'store', {'resolution': 64}) as writer: writer.append('all', timing.random_slices(200, 64), rows); writer.finish()
    assert math.isclose(store_bytes(200, 64), sum(f.stat().st_size for f in (place/'store').iterdir()), rel_tol=0.1)

@pytest.mark.parametrize('params', [ProgressiveGANParams(growth={'train_kimg': 3, 'fade_kimg': 2, 'batch_sizes': {4: 64, 8: 32}}, training={'kimg': 40, 'batch_size': 8}),
    StyleGAN1Params(growth={'first_resolution': 8, 'train_kimg': 4, 'fade_kimg': 0, 'batch_sizes': {8: 32}}, training={'kimg': 20, 'batch_size': 16}),
    ProgressiveGANParams(growth={'train_kimg': 0, 'fade_kimg': 5, 'batch_sizes': {4: 64, 8: 32}}, training={'kimg': 12, 'batch_size': 8}),
    ProgressiveGANParams(growth={'train_kimg': 0, 'fade_kimg': 0}, training={'kimg': 6.4, 'batch_size': 8})], ids=['grows', 'no fading', 'only fading, ends early', 'grown'])
def test_stages_add_up_to_the_steps(params):
    "The same sum, step by step as the trainer takes them."
    with torch.device('meta'): model = build_generator(params, 32, 0)
    model.reached = torch.tensor(0)
    def costs(resolution, size): return resolution**2 + 100 / size      # of an image
    images, brute, training = 0, 0., params.training
    while images < 1000 * training.kimg:
        size = model.batch_size(images, training); model.begin_step(images)
        brute += size * costs(resolution_at(model.level), size); images += size
    total = 0.
    for stage in timing.stages(model, training):
        model.begin_step(stage.middle)
        assert model.batch_size(stage.middle, training) == stage.batch_size
        total += stage.images * costs(resolution_at(model.level), stage.batch_size)
    assert math.isclose(total, brute, rel_tol=0.01)
    assert sum(s.images for s in timing.stages(model, training)) == 1000 * training.kimg

def test_a_lazy_phase_counts_as_often_as_it_comes():
    phases = pd.DataFrame([{'images': 8 * 320, 'every': every, 'seconds': t} for every, t in ((1, 0.5), (4, 3.), (16, 7.))])
    brute = sum(8 * row.seconds for step in range(320) for row in phases.itertuples() if step % row.every == 0)
    assert math.isclose(timing.training_seconds(phases), brute)

def test_lazy_phases_are_measured_as_the_trainer_takes_them():
    params = StyleGAN2Params(latents=16, width=16, mapping_layers=1, channel_base=128, channel_max=16, r1_every=8, path_every=2, training={'kimg': 1, 'batch_size': 4})
    rates = timing.training_rates(build_generator(params, 16, 0), params.training, 16, patience=0.01)
    rows = pd.DataFrame(rates['phases']).set_index('phase')
    assert rows.every.to_dict() == {'generator': 1, 'path': 2, 'discriminator': 1, 'r1': 8, 'average': 1} and (rows.measured[['path', 'r1']] >= 2).all()
    assert math.isclose(rates['training'], 1000 * (rows.seconds / rows.every).sum())

def test_the_papers_grid(paper):
    study = paper('study')
    found = plan(study, jobs=8, rates=given(measurements(study)))
    table = found.table.set_index('kind')
    assert sum(kind.startswith('generator: ') for kind in table.index) == 5 and (table.runs[table.index.str.startswith('generator: ')] == 1).all()
    assert table.runs[table.index.str.startswith('segmenter: ')].sum() == 2 * (1 + 5 * 2) * 2 * 10 and table.runs.sum() == 452 and table.done.sum() == 0
    assert (found.sizes.train, found.sizes.train_subjects, found.sizes.test_subjects) == (91_271, 1195, 56) and 'paper' in found.sizes.source
    assert math.isclose(table.hours['generator: Diffusion'] * 3600, 10 + 5000 + 100_000 * 0.25)
    assert math.isclose(table.disk_gb['generator: Diffusion'], 100_000 * 5 * 256**2 / 1e9 + 0.1) and math.isclose(table.disk_gb['prepare'], (91_271 + found.sizes.test) * 5 * 256**2 / 1e9, rel_tol=1e-2)
    unet = 30e6 * 0.5 + 150 * 0.1 * round(0.2 * 91_271) + 10 + 0.1 * found.sizes.test + 0.5 * 56
    assert math.isclose(table.seconds_each['segmenter: U-Net, real'], unet)
    swin = {kind: table.seconds_each[f'segmenter: Swin, {kind}'] for kind in ('real', 'synthetic', 'real + synthetic')}      # 25 epochs of all training images
    assert math.isclose(swin['real'], 25 * (0.5 * (73_017 // 8 * 8) + 0.1 * 18_254) + 10 + 0.1 * found.sizes.test + 0.5 * 56)
    assert swin['real'] < swin['synthetic'] < swin['real + synthetic']
    assert found.wall == max(found.chain, found.hours / 8) and found.chain < found.hours
    text = str(found)
    assert '452 runs, 0 finished' in text and "the paper's number of training slices" in text and 'StyleGAN 3' in text and '8 runs at once' in text

@pytest.mark.parametrize('name', ['ratio', 'ensemble'])
def test_the_papers_other_studies(paper, name):
    study = paper(name)
    found = plan(study, rates=given(measurements(study)))
    runs = found.table.set_index('kind').runs
    assert runs.to_dict() == ({'prepare': 1, 'generator: StyleGAN 3': 1, 'segmenter: U-Net, pool': 100, 'ratio': 1} if name == 'ratio' else
                              {'prepare': 1, 'generator: Progressive GAN': 10, 'segmenter: U-Net, pool': (10 + 5 + 2 + 1) * 10, 'ensemble': 1})
    assert len(measurements(study)) == 4 and found.hours > 100 and '1 run at once' in str(found)

def test_what_is_finished_costs_nothing(place):
    study = Study.model_validate(STUDY)
    rates = given(measurements(study))
    whole = plan(study, rates=rates)
    for run in all_runs(study):
        run.result('.csv').parent.mkdir(parents=True, exist_ok=True); run.result('.csv').touch()
    done = plan(study)      # measures nothing
    assert measurements(study) == {} and done.hours == done.wall == done.chain == 0 and (done.table.done == done.table.runs).all() and done.table.disk_gb.sum() == 0 and 'finished' in str(done)
    segmenter = next(r for r in all_runs(study) if r.report == 'segmenter' and r.mixture == 'real')
    segmenter.result('.csv').unlink(); study.data.folder.mkdir(parents=True); study.data.folder.rmdir()
    left = plan(study, rates=rates)
    assert math.isclose(3600 * left.hours, run_seconds(segmenter, rates, whole.sizes) + run_seconds(study.data, rates, whole.sizes))    # the slices were deleted: they are made again

def test_the_longest_chain(place):
    study = Study.model_validate({**STUDY, 'seeds': [0, 1]})
    seconds = {r.name: {'prepare': 1., 'generator': 10., 'segmenter': 100., 'evaluation': 1000., 'comparison': 5.}[r.report] for r in all_runs(study)}
    assert longest_chain(study, seconds) == 1 + 100 + 1000 + 5      # the evaluation waits for a segmenter on real images

def test_unknown_slices(place):
    data = {'dataset': 'own', 'nifti': 'not/here'}
    study = Study.model_validate({'data': data, 'generators': [{'data': data}], 'segmenters': [{'data': data}], 'seeds': [0]})
    with pytest.raises(CostError, match=r'not/here: no such folder.*slices'): plan(study)
    found = plan(study, slices=5000, rates=given(measurements(study)))
    assert (found.sizes.train, found.sizes.train_subjects) == (5000, 67) and 'as given' in str(found)

def test_a_measurement_that_fails(place):
    study = Study.model_validate(STUDY)
    wanted = measurements(study)
    rates, name = given(wanted), next(n for n in wanted if n.startswith('stylegan2'))
    rates[name] = {'failed': 'killed by signal 9, most likely for want of memory'}
    found = plan(study, rates=rates)
    assert np.isnan(found.table.set_index('kind').hours['generator: StyleGAN 2']) and found.hours > 0 and 'without generator: StyleGAN 2' in str(found) and 'killed' in str(found)
    killed = Measurement(eval, ('__import__("os").kill(__import__("os").getpid(), 9)',), 1)
    after = dict(measure_apart({'killed': killed, 'next': Measurement(dict, ({'answer': 42},), 1)}))
    assert 'killed by signal 9' in after['killed']['failed'] and after['next']['answer'] == 42
    with pytest.raises(MeasuringError, match='x: cannot be measured: ZeroDivisionError'): dict(measure_apart({'x': Measurement(eval, ('1/0',), 1)}))

def test_memory_that_is_not_there_is_told(place):
    study = Study.model_validate(STUDY)
    rates = given(measurements(study))
    for rate in rates.values(): rate.update({'memory': 9e15} if 'memory' in rate else {})
    assert 'MEMORY: generator: StyleGAN 2' in str(plan(study, rates=rates))

def test_measurements_are_kept(place, monkeypatch):
    calls = []
    monkeypatch.setattr(measuring, 'measure_apart', lambda wanted: ((name, calls.append(name) or {'share': 0.3 if name == 'subject' else 1.}) for name in wanted))
    study = Study.model_validate(STUDY)
    wanted = measurements(study)
    assert measure(wanted, progress=False) == measure(wanted, progress=False) and calls == [*sorted(wanted, key=lambda n: wanted[n].threads), 'subject']     # that was disturbed
    calls.clear()
    longer = Study.model_validate({**STUDY, 'generators': [{**GENERATOR, 'generator': {**GENERATOR['generator'], 'latents': 16}}], 'seeds': [0, 1, 2]})
    measure(measurements(longer), progress=False)
    assert len(calls) == 2 and calls[0] == 'subject'
    calls.clear(); measure(wanted, again=True, progress=False)
    assert len(calls) == len(wanted)
