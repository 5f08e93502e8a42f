"Event files and previews: what TensorBoard will read, nothing twice after a kill, and a training that is the same with and without them."
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from synthmr.generators.families import FAMILIES, build_generator
from synthmr.segmenters.training import Segmentation
from synthmr.training import Phase, Trainable, load_weights, train
from synthmr.watching import read_events
from test_gans import COMMON, MODELS, lines, store     # noqa: F401 (a fixture)

DIFFUSION = {'process': 'ddpm', 'channels': 8, 'multipliers': [1, 2], 'blocks': 1, 'attention': [8], 'heads': 2, 'dropout': 0.1}
KINDS = {**MODELS, 'diffusion': DIFFUSION}
TRAINING = COMMON['training'].model_copy(update={'precision': 'bf16', 'accumulate': 2, 'preview_every': 0.04})

def model(kind: str, **training):
    torch.set_num_threads(1)
    common = {k: v for k, v in COMMON.items() if k != 'training'} if kind != 'diffusion' else {}
    return build_generator(FAMILIES[kind][0](**{**common, **KINDS[kind]}, training=TRAINING.model_copy(update=training)), 16, 0)

class Stop(Exception): pass

def run(kind, store, folder, stop=None, **training):
    "The generator after its training, which may be cut before the part of that number."
    generator, count = model(kind, **training), iter(range(10**6))
    def look(batch):
        if next(count) == stop: raise Stop
        return batch
    try: train(generator, [store], generator.params.training, folder, 1, config=generator.params, progress=False, prepare_batch=look)
    except Stop: pass
    return generator

def scalars(folder: Path) -> list[tuple]: return [(e.step, v.tag, v.simple_value) for e in read_events(folder/'events') for v in e.summary.value if v.WhichOneof('value') == 'simple_value' and v.tag != 'seconds']
def pictures(folder: Path) -> list[tuple]: return [(e.step, v.image.encoded_image_string) for e in read_events(folder/'events') for v in e.summary.value if v.WhichOneof('value') == 'image']

@pytest.mark.parametrize('kind', KINDS)
def test_previews_change_nothing(kind, store, tmp_path):
    "Weights, buffers and log are the same to the last bit with and without previews, and after a kill; events hold each line of the log once."
    without, whole = run(kind, store, tmp_path/'without', preview_every=None), run(kind, store, tmp_path/'whole')
    run(kind, store, tmp_path/'cut', stop=45)
    early = pictures(tmp_path/'cut')
    resumed = run(kind, store, tmp_path/'cut')
    for other in (whole, resumed): assert all(a.equal(b) for a, b in zip(without.state_dict().values(), other.state_dict().values(), strict=True)) and other.training
    weights = {(tmp_path/name/'weights.safetensors').read_bytes() for name in ('without', 'whole', 'cut')}
    assert len(weights) == 1 and lines(tmp_path/'without') == lines(tmp_path/'whole') == lines(tmp_path/'cut')
    logged = [(round(1000*line['kimg']), tag, np.float32(value)) for line in lines(tmp_path/'cut') for tag, value in line.items() if tag not in ('step', 'kimg')]
    assert scalars(tmp_path/'cut') == scalars(tmp_path/'whole') == scalars(tmp_path/'without') == logged
    shown = pictures(tmp_path/'cut')
    assert shown == pictures(tmp_path/'whole') and early[0] == shown[0] and len(shown) >= 6 and len({image for _, image in shown}) > 3
    assert [step for step, _ in shown] == sorted({step for step, _ in shown}) and not pictures(tmp_path/'without') and not (tmp_path/'without'/'preview.png').exists()
    assert (tmp_path/'cut'/'preview.png').read_bytes() == shown[-1][1]
    assert Image.open(tmp_path/'cut'/'preview.png').size == (8*16, 5*16)
    assert len(list((tmp_path/'cut'/'events').iterdir())) == 2

def test_a_preview_is_of_the_average(store, tmp_path):
    "The last preview shows the weights that are kept, not those that are trained."
    generator = run('stylegan2', store, tmp_path/'run')
    trained = generator.eval().preview()
    load_weights(generator, tmp_path/'run')
    with Image.open(tmp_path/'run'/'preview.png') as shown: kept = np.asarray(shown)
    with torch.no_grad(): ours = generator.preview()
    assert np.array_equal(kept, ours) and not np.array_equal(kept, trained)

def test_a_growing_network_shows_the_level_that_it_has_reached(store, tmp_path):
    "While it knows 8x8 pixels, each of its pixels stands for four."
    run('progressive_gan', store, tmp_path/'run', preview_every=0.016, stop=8)
    first = np.asarray(Image.open(io.BytesIO(pictures(tmp_path/'run')[0][1])))[:4*16]   # the sequences
    assert np.array_equal(first[::2, ::2], first[1::2, 1::2]) and first.std() > 0

def test_thousands_of_steps_are_not_previewed(monkeypatch):
    "The paper's 4,000 ancestral steps become 20, and 8 images become 4 at 256 pixels."
    torch.set_num_threads(1)
    generator = model('diffusion').eval()
    assert generator.params.sampling_steps == 4000 and generator.params.sampler == 'ancestral'
    seen = []
    denoise = type(generator).denoise
    monkeypatch.setattr(type(generator), 'denoise', lambda self, x, sigma: (seen.append(len(x)), denoise(self, x, sigma))[1])
    with torch.no_grad(): assert generator.preview().shape == (5*16, 8*16, 3)
    assert seen == [8]*20
    generator.resolution = 256
    generator.preview_chunk = lambda seed, numbers: torch.zeros(len(numbers), 5, 256, 256)
    assert generator.preview().shape == (5*256, 4*256, 3)

def test_a_segmenter_has_no_picture():
    assert Segmentation.preview is Trainable.preview

def test_a_preview_is_no_reason_to_compile_once_more(store, tmp_path):
    "Four images of a preview would be another graph for the compiler, and might change which one training takes."
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(5, 5, 3, padding=1)
        def forward(self, x): return nn.functional.leaky_relu(self.conv(x), 0.2)
    class Compiled(Trainable):
        def __init__(self): super().__init__(); self.net = self.averaged = Net()
        def loss(self, batch, step): return (self.net(batch + torch.randn_like(batch)) - batch).square().mean(), {}
        def phases(self): return [Phase('net', self.net, torch.optim.Adam(self.net.parameters(), 1e-2), self.loss)]
        def preview(self): return self.net(torch.randn(4, 5, 16, 16)).clamp(0, 1).mul(255).byte()[:, 0].reshape(-1, 16).numpy()
    torch.set_num_threads(1)
    graphs = []
    for every in (None, 0.016):
        torch.manual_seed(0); torch._dynamo.reset(); torch._dynamo.utils.counters.clear()
        train(Compiled(), [store], TRAINING.model_copy(update={'compile': True, 'precision': 'fp32', 'accumulate': 1, 'kimg': 0.08, 'preview_every': every}), tmp_path/f'{every}', 1, progress=False)
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs[0] == graphs[1] > 0 and len(pictures(tmp_path/'0.016')) == 5
    assert (tmp_path/'None'/'weights.safetensors').read_bytes() == (tmp_path/'0.016'/'weights.safetensors').read_bytes()
