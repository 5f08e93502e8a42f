"Fidelity: distances against closed forms and brute force, memory, networks against MONAI's, weight files that are not what they should be."
import functools
import http.server
import threading
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from scipy.linalg import sqrtm
from scipy.special import xlogy
from torch import nn

from synthmr.metrics.features import FeatureError, InceptionFeatures, RadImageNetFeatures, fetch, load_state, open_extractor, read_state
from synthmr.metrics.fidelity import FidelityParams, Summary, compare, fidelity, inception_score
from synthmr.metrics.frechet import Moments, frechet_distance, mean_and_covariance
from synthmr.metrics.inception import Inception
from synthmr.metrics.neighbours import Reservoir, kernel_distance, kernel_sums, neighbour_measures
from synthmr.metrics.resnet import ResNet50
from synthmr.slices import SliceStore, StoreWriter

def features(n: int, d: int=16, seed: int=0, shift: float=0) -> np.ndarray:
    "Correlated normal features."
    rng = np.random.default_rng([seed, n, d])
    return rng.normal(size=(n, d)) @ np.random.default_rng(seed).normal(size=(d, d)) / d**0.5 + shift

def values(real: np.ndarray, synthetic: np.ndarray, params: FidelityParams, probabilities=None) -> pd.DataFrame:
    "All measures by name."
    return compare(Summary(params).add(real), Summary(params, 1).add(synthetic, probabilities), params).set_index('metric')

# Fréchet distance

@pytest.mark.parametrize('d', [1, 2, 64, 300])
def test_frechet_distance_of_commuting_covariances_has_a_closed_form(d):
    rng = np.random.default_rng(d)
    m1, m2, s1, s2 = np.abs(rng.normal(size=(4, d)))
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    found = frechet_distance(turn @ m1, turn * s1**2 @ turn.T, turn @ m2, turn * s2**2 @ turn.T)
    assert found == pytest.approx(((m1 - m2)**2).sum() + ((s1 - s2)**2).sum(), rel=1e-8)

@pytest.mark.parametrize('n', [500, 40])    # regular, and singular with 64 features
def test_frechet_distance_is_that_of_the_square_root_of_the_matrix(n):
    a, b = features(n, 64), features(n, 64, 1, 0.3)
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(ca) + np.trace(cb) - 2*np.trace(sqrtm(ca @ cb).real)
    found = [frechet_distance(*mean_and_covariance(Moments().add(x)), *mean_and_covariance(Moments().add(y))) for x, y in ((a, b), (b, a))]
    assert found == pytest.approx([expected]*2, rel=1e-4) and found[0] == pytest.approx(found[1], rel=1e-9)
    assert frechet_distance(a.mean(0), ca, a.mean(0), ca) < 1e-10 * np.trace(ca)

def test_moments_do_not_depend_on_the_chunks():
    x = features(1000, shift=5)
    sums = []
    for size in (1, 7, 256, 1000):
        m = Moments()
        for i in range(0, len(x), size): m.add(x[i:i + size])
        sums.append(mean_and_covariance(m))
    for mean, covariance in sums: assert np.allclose(mean, x.mean(0), rtol=1e-12) and np.allclose(covariance, np.cov(x.T), rtol=1e-9, atol=1e-12)

def test_an_added_chunk_is_not_aliased():
    "The caller may use its buffer again."
    buffer, m = np.ones((4, 2)), Moments()
    m.add(buffer); buffer[:] = 9
    assert m.sums[0].tolist() == [4, 4]

# Scores by definition

def test_kernel_distance_is_the_unbiased_estimate():
    x, y = features(70), features(50, seed=1, shift=0.2)
    kxx, kyy, kxy = (((a @ b.T) / 16 + 1)**3 for a, b in ((x, x), (y, y), (x, y)))
    expected = (kxx.sum() - np.trace(kxx)) / (70*69) + (kyy.sum() - np.trace(kyy)) / (50*49) - 2*kxy.mean()
    params = FidelityParams(blocks=7, replicates=0)
    assert values(x, y, params).value.kernel_distance == pytest.approx(expected, rel=1e-8)

def test_kernel_distance_of_drawn_blocks_has_no_pair_of_an_image_with_itself():
    "With a block drawn twice, a naive sum over copies would count k(x, x)."
    x, y = features(12), features(10, seed=1)
    bx, by = np.arange(12) % 3, np.arange(10) % 3
    sums = kernel_sums(x, None, bx, None, 3), kernel_sums(y, None, by, None, 3), kernel_sums(x, y, bx, by, 3)
    one = np.array([1, 0, 0])
    assert kernel_distance(*sums, 2*one, 3*one) == pytest.approx(kernel_distance(*sums, one, one), rel=1e-12)

@pytest.mark.parametrize('splits', [1, 10])
def test_inception_score_is_its_definition(splits):
    p = np.random.default_rng(0).dirichlet(np.full(12, 0.2), 400)
    params = FidelityParams(blocks=20, splits=splits, replicates=0)
    parts = np.array_split(np.concatenate([p[b::20] for b in range(20)]), splits)
    expected = np.mean([np.exp(np.mean((xlogy(q, q) - xlogy(q, q.mean(0))).sum(1))) for q in parts])
    assert values(features(50), features(400, seed=1), params, p).value.inception_score == pytest.approx(expected, rel=1e-8)

def test_inception_score_of_float32_certainty_is_finite():
    assert inception_score(np.zeros(1), np.array([[10., 0, 0]]), np.array([10])) == 1

@pytest.mark.parametrize('k', [1, 3, 5])
def test_precision_recall_density_coverage_are_those_of_brute_force(k):
    real, synthetic = features(45), features(60, seed=0, shift=0.3)
    def distance(a, b): return np.sqrt(((a - b)**2).sum())
    def reach(x): return [sorted(distance(a, b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]
    r, s = reach(real), reach(synthetic)
    within = np.array([[distance(a, b) <= r[i] for b in synthetic] for i, a in enumerate(real)])
    expected = {'precision': within.any(0), 'recall': [any(distance(a, b) <= s[j] for j, b in enumerate(synthetic)) for a in real],
                'density': within.sum(0) / k, 'coverage': within.any(1)}
    found = neighbour_measures(real, synthetic, k, chunk=16)
    for name in expected: assert np.array_equal(found[name], np.asarray(expected[name], float)), name
    params = FidelityParams(blocks=4, replicates=0, neighbours=k)
    table = values(real, synthetic, params)
    for name in expected: assert table.value[name] == pytest.approx(np.mean(expected[name]))

def test_a_set_is_faithful_to_itself_and_order_does_not_matter():
    x, params = features(300), FidelityParams(blocks=5, replicates=0)
    same = values(x, x, params).value
    assert same.frechet_distance < 1e-9 and (same[['precision', 'recall', 'coverage']] == 1).all()
    y = features(200, seed=2, shift=0.1)
    shuffled = np.random.default_rng(0).permutation(200)
    pd.testing.assert_series_equal(values(x, y, params).value, values(x, y[shuffled], params).value)

# Streaming

def test_rows_do_not_depend_on_the_chunks():
    x, y, params = features(400), features(400, seed=1), FidelityParams(blocks=6, reservoir=90, replicates=10)
    p = np.random.default_rng(0).dirichlet(np.ones(4), 400)
    def rows(size):
        a, b = Summary(params), Summary(params, 1)
        for i in range(0, 400, size): a.add(x[i:i + size]); b.add(y[i:i + size], p[i:i + size])
        return compare(a, b, params)
    for size in (1, 13, 400): pd.testing.assert_frame_equal(rows(64), rows(size), rtol=1e-9)

def test_memory_does_not_grow_with_the_images():
    params, d = FidelityParams(blocks=4, reservoir=200), 64
    summary, rng, held = Summary(params), np.random.default_rng(0), []
    chunk = [rng.normal(size=(100, d)).astype(np.float32) for _ in range(10)]
    tracemalloc.start()
    try:
        for i in range(400):
            summary.add(chunk[i % 10], np.full((100, 5), 0.2))
            if i in (39, 399): held.append(tracemalloc.get_traced_memory()[0]); peak = tracemalloc.get_traced_memory()[1]; tracemalloc.reset_peak()
    finally: tracemalloc.stop()
    assert summary.n == 40_000 and len(summary.reservoir.features) == 200
    limit = 4 * (d*d + 2*256*d) * 8 + 3*200*d*4     # sums and waiting rows of each block, and the reservoir
    assert max(held) < limit and peak < 2*limit and peak < 40_000*d*4 / 5

def test_reservoirs_of_real_and_synthetic_images_draw_differently():
    params = FidelityParams(reservoir=20)
    x = np.arange(500.)[:, None]
    a, b = Summary(params).add(x), Summary(params, 1).add(x)
    assert not np.array_equal(a.reservoir.features, b.reservoir.features)
    assert np.array_equal(a.reservoir.features, Summary(params).add(x).reservoir.features)

def test_a_reservoir_larger_than_the_set_keeps_all():
    r = Reservoir(100); r.add(np.arange(30.)[:, None], np.zeros(30, int))
    assert np.array_equal(r.features[:, 0], np.arange(30.))

# The bootstrap

def test_the_bootstrap_draws_blocks():
    "The replicates are those of features drawn by hand."
    x, y, params = features(60), features(80, seed=1), FidelityParams(blocks=5, replicates=30)
    rng = np.random.default_rng([params.seed, 2])
    def drawn(z, d): return np.concatenate([z[b::5] for b in d])
    def fid(a, b): return frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    by_hand = np.array([fid(*[drawn(z, d) for z, d in zip((x, y), [rng.choice(5, 5), rng.choice(5, 5)])]) for _ in range(30)])
    row = values(x, y, params).loc['frechet_distance']
    assert row.bias == pytest.approx(by_hand.mean() - fid(x, y), rel=1e-8)
    assert [row.low, row.high] == pytest.approx(np.quantile(by_hand, (0.025, 0.975)) - row.bias, rel=1e-8)

def test_real_slices_are_drawn_by_subject(tmp_path):
    "Copies of the same slices under the same subject must not make the interval narrower."
    def store(name, copies):
        with StoreWriter(tmp_path/name, {'resolution': 8}) as writer:
            for s in range(12):
                image = np.random.default_rng(s).integers(256, size=(2, 5, 8, 8), dtype=np.uint8)
                writer.append(f's{s}', np.repeat(image, copies, 0), [{'subject': f's{s}', 'z': z, 'split': 'train', 'tumour': 0} for z in range(2*copies)])
            return writer.finish()
    def look(images): return images[:, 1].reshape(len(images), -1)[:, :3].astype(np.float32), None
    look.record = {'kind': 'example', 'no_score': ''}
    params = FidelityParams(blocks=12, replicates=100)
    width = [fidelity(look, store(f'r{n}', n), store(f's{n}', n), params, progress=False).set_index('metric').loc['frechet_distance'].pipe(lambda r: r.high - r.low) for n in (1, 8)]
    assert width[1] > 0.7 * width[0]

def test_a_row_says_what_it_depends_on(tmp_path):
    with StoreWriter(tmp_path/'both', {'resolution': 8}) as writer:
        for s in range(6):
            images = np.random.default_rng(s).integers(256, size=(5, 5, 8, 8), dtype=np.uint8)
            writer.append(f's{s}', images, [{'subject': f's{s}', 'z': z, 'split': ('train', 'test')[s // 4], 'tumour': 0} for z in range(5)])
        store = writer.finish()
    def look(images): return images[:, :2].mean((2, 3)), np.eye(3)[images[:, 0, 0, 0] % 3]
    look.record = {'kind': 'radimagenet', 'weights': 'w.pt', 'sha256': 'ab', 'sequence': 'T1wGd', 'resizing': 'none'}
    for reference, n in (('train', 20), ('test', 10)):
        rows = fidelity(look, store, SliceStore.open(tmp_path/'both'), FidelityParams(reference=reference, replicates=5, neighbours=2, seed=3), progress=False)
        assert rows.label.tolist()[:3] == ['Rad-FID', 'Rad-IS', 'Rad-KID'] and rows.value.notna().all()
        for key, value in {'kind': 'radimagenet', 'sha256': 'ab', 'sequence': 'T1wGd', 'reference': reference, 'n_real': n, 'n_synthetic': 30, 'seed': 3, 'resolution': 8}.items(): assert (rows[key] == value).all()

def test_what_cannot_be_computed_is_nan_with_a_reason():
    params = FidelityParams(replicates=3)
    table = values(features(300), features(1), params)
    assert 'at least 2 images' in table.undefined.frechet_distance and 'at least 6 images' in table.undefined.recall and 'no classes' in table.undefined.inception_score
    assert table.value.isna().all()
    with pytest.raises(ValueError, match='images 0 to 2 are not finite'): Summary(params).add(np.full((3, 2), np.inf))

# Networks and their weights

def randomise(network: nn.Module) -> nn.Module:
    "Weights and statistics that no default has."
    torch.manual_seed(0)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d): m.weight.data.uniform_(0.5, 1); m.bias.data.normal_(0, 0.1); m.running_mean.normal_(0, 0.1); m.running_var.uniform_(0.5, 1.5)
    return network.eval()

@pytest.fixture(scope='module')
def resnet() -> ResNet50: return randomise(ResNet50(classes=165))

def test_resnet_is_monais(resnet):
    nets = pytest.importorskip('monai.networks.nets')
    other = nets.resnet50(spatial_dims=2, n_input_channels=3, num_classes=165, conv1_t_stride=2, bias_downsample=False)
    other.load_state_dict(resnet.state_dict())
    x = torch.rand(2, 3, 224, 224) * 255
    with torch.inference_mode(): assert torch.allclose(resnet(x)[1], other.eval()(x / 127.5 - 1), rtol=1e-4, atol=1e-4)

def test_the_published_names_of_radimagenet_load(resnet, tmp_path):
    listed = {'conv1': 0, 'bn1': 1, 'layer1': 4, 'layer2': 5, 'layer3': 6, 'layer4': 7}
    state = {f"backbone.{listed[k.split('.')[0]]}.{k.split('.', 1)[1]}": v for k, v in resnet.state_dict().items() if not k.startswith('fc')}
    torch.save(state, tmp_path/'ResNet50.pt')
    torch.save(resnet.state_dict(), tmp_path/'classes.pt')
    images = np.random.default_rng(0).integers(256, size=(1, 5, 24, 24), dtype=np.uint8)
    bare, full = (open_extractor(RadImageNetFeatures(weights=str(tmp_path/name), sequence='FLAIR')) for name in ('ResNet50.pt', 'classes.pt'))
    assert np.array_equal(bare(images)[0], full(images)[0]) and bare(images)[1] is None and full(images)[1].shape == (1, 165)
    assert 'ResNet50.pt has no layer of classes' in bare.record['no_score'] and full.record['no_score'] == '' and bare.record['sequence'] == 'FLAIR'
    with torch.inference_mode(): assert np.allclose(resnet(torch.from_numpy(images[:, [3, 3, 3]]).float())[0], bare(images)[0])

def test_inception_has_the_names_of_the_published_file():
    shapes = {k: tuple(v.shape) for k, v in Inception().state_dict().items() if not k.endswith('num_batches_tracked')}
    known = {'Conv2d_1a_3x3.conv.weight': (32, 3, 3, 3), 'Mixed_5b.branch_pool.conv.weight': (32, 192, 1, 1), 'Mixed_5d.branch5x5_2.bn.running_var': (64,), 'Mixed_6a.branch3x3.conv.weight': (384, 288, 3, 3),
             'Mixed_6c.branch7x7dbl_5.conv.weight': (192, 160, 1, 7), 'Mixed_7a.branch7x7x3_3.conv.weight': (192, 192, 7, 1), 'Mixed_7b.branch_pool.conv.weight': (192, 1280, 1, 1),
             'Mixed_7c.branch3x3dbl_3b.conv.weight': (384, 384, 3, 1), 'fc.weight': (1008, 2048), 'fc.bias': (1008,)}
    assert {k: shapes.get(k) for k in known} == known and len(shapes) == 94*5 + 2

class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture
def served(tmp_path):
    "A folder and the URL under which it is served."
    (tmp_path/'served').mkdir()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(_Quiet, directory=tmp_path/'served')) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path/'served', f'http://127.0.0.1:{server.server_port}'
        server.shutdown()

def test_weights_are_downloaded_once_and_hashed(served, tmp_path):
    folder, url = served
    safetensors.torch.save_file({'w': torch.ones(3)}, folder/'w.safetensors')
    path, sha256 = fetch(f'{url}/w.safetensors', folder=tmp_path/'kept', progress=False)
    assert read_state(path)['w'].tolist() == [1, 1, 1] and len(sha256) == 64
    (folder/'w.safetensors').unlink()
    assert fetch(f'{url}/w.safetensors', sha256, tmp_path/'kept', progress=False) == (path, sha256)
    with pytest.raises(FeatureError, match='cannot be fetched: HTTP Error 404'): fetch(f'{url}/other.pth', folder=tmp_path/'kept', progress=False)
    with pytest.raises(FeatureError, match=f'its SHA-256 is {sha256}, not 00'): fetch(path, '00')
    assert [p.name for p in (tmp_path/'kept').iterdir()] == [path.name]

def test_wrong_weights_are_refused_by_file_and_key(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    state = {k: v for k, v in network.state_dict().items() if not k.endswith('num_batches_tracked')}     # as old files
    load_state(network, state, tmp_path/'old.pth')
    for change, said in (({'0.weight': None}, 'lacks 0.weight'), ({'2.bias': torch.zeros(1)}, 'holds unknown 2.bias'), ({'0.weight': torch.zeros(3, 1, 1, 1)}, r'0.weight is \(3, 1, 1, 1\), Sequential needs \(2, 1, 1, 1\)')):
        with pytest.raises(FeatureError, match=f'bad.pth: {said}'): load_state(network, {k: v for k, v in {**state, **change}.items() if v is not None}, tmp_path/'bad.pth')
    torch.save(state, tmp_path/'small.pth')
    for params in (InceptionFeatures(weights=str(tmp_path/'small.pth')), RadImageNetFeatures(weights=str(tmp_path/'small.pth'))):
        with pytest.raises(FeatureError, match=r'small.pth: lacks (Conv2d_1a_3x3\.conv\.weight|conv1\.weight)'): open_extractor(params)

class _Evil:
    def __reduce__(self): return print, ('executed',)

def test_a_pickle_that_runs_code_is_not_run(tmp_path, capsys):
    torch.save({'w': _Evil()}, tmp_path/'evil.pth')
    with pytest.raises(FeatureError, match='evil.pth: refused: __builtin__.print'): read_state(tmp_path/'evil.pth')
    torch.save([1, 2], tmp_path/'list.pth')
    with pytest.raises(FeatureError, match='list.pth: is no dictionary'): read_state(tmp_path/'list.pth')
    assert 'executed' not in capsys.readouterr().out

def test_metrics_know_no_model_of_the_study():
    from pathlib import Path
    import synthmr.metrics
    for file in Path(synthmr.metrics.__path__[0]).glob('*.py'): assert not any(w in file.read_text() for w in ('from ..segmenters', 'from ..generators', 'from ..studies')), file
