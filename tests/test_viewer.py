"The viewer: the picture always, the widget where it is of use; what the browser gets; what a published page shows; JupyterLab itself."
import base64
import io
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import nibabel as nib
import numpy as np
import pytest
from isal import igzip
from PIL import Image, ImageColor

from synthmr import viewer
from synthmr.data.nifti import find_subjects, read_volume
from synthmr.data.simulated import SimulatedParams, simulate_cohort
from synthmr.plots import CLASS_COLOURS
from synthmr.slices import SEQUENCES
from synthmr.studies.study import as_page

ROOT = Path(__file__).resolve().parents[1]
VIEW, STATE = 'application/vnd.jupyter.widget-view+json', 'application/vnd.jupyter.widget-state+json'

@pytest.fixture(scope='module')
def cohort(tmp_path_factory) -> Path:
    "One simulated subject whose tumour has all classes."
    folder = tmp_path_factory.mktemp('viewer')/'cohort'
    simulate_cohort(folder, SimulatedParams(subjects=1, spacing=3, workers=0, seed=3), progress=False)
    return folder

def seen_colours(png: bytes, opacity: float=1) -> set[str]:
    "The classes whose colour is in a picture, laid over any grey."
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert('RGB')).reshape(-1, 3)
    beneath = {name: pixels - opacity * np.array(ImageColor.getrgb(colour)) for name, colour in CLASS_COLOURS.items()}
    return {name for name, grey in beneath.items() if ((np.ptp(grey, axis=1) < 12) & (np.abs(grey - 255 * (1 - opacity) / 2).max(1) < 255 * (1 - opacity) / 2 + 8)).sum() > 20}

def test_without_ipyniivue_there_is_the_picture(cohort, monkeypatch):
    monkeypatch.setenv('JPY_SESSION_NAME', 'lesson.ipynb')
    monkeypatch.setattr(viewer, 'find_spec', lambda name: None)
    bundle = viewer.show_volume(cohort)._repr_mimebundle_()
    assert set(bundle) == {'text/plain', 'image/png'} and seen_colours(base64.b64decode(bundle['image/png'])) == set(CLASS_COLOURS)
    with pytest.raises(ValueError, match='ipyniivue'): viewer.show_volume(cohort, live=True)

def test_the_bundle_holds_both_where_a_server_runs_the_notebook(cohort, monkeypatch):
    monkeypatch.delenv('JPY_SESSION_NAME', raising=False)
    assert VIEW not in viewer.show_volume(cohort)._repr_mimebundle_()           # papermill, nbconvert, nbdev
    monkeypatch.setenv('JPY_SESSION_NAME', 'lesson.ipynb')
    view = viewer.show_volume(cohort)
    bundle = view._repr_mimebundle_()
    assert bundle[VIEW]['model_id'] == view.widget.model_id and bundle['image/png'] and bundle['text/plain'].startswith('VolumeView(SIM_00000')

def test_the_widget_gets_the_volumes_the_affine_and_the_colours(cohort):
    source = find_subjects(cohort)['SIM_00000']
    classes = read_volume(source.files['annotation'])[0]
    classes = np.where(classes == 4, 3, classes)
    volumes = viewer.from_files(source, {'U-Net': np.where(classes == 3, 1, classes)})
    box = viewer.widget(volumes, 'FLAIR', height=300)
    bar, view = box.children
    below, over = (b for b in bar.children if hasattr(b, 'options'))
    named = {v.name.removesuffix('.nii.gz'): v for v in view.volumes}
    assert list(named) == [*SEQUENCES, 'annotation', 'U-Net'] and below.value == 'FLAIR' and over.value == 'annotation' and view.height == 300
    assert view.opts.is_radiological_convention and not view.opts.drag_and_drop_enabled
    expected, shown = viewer._cropped(volumes), {**volumes.sequences, **volumes.labels}
    for name, sent in named.items():
        image = nib.Nifti1Image.from_bytes(igzip.decompress(sent.data))
        assert np.array_equal(np.asanyarray(image.dataobj), {**expected.sequences, **expected.labels}[name]) and np.allclose(image.affine, expected.affine)
        whole = nib.Nifti1Image(shown[name], volumes.affine)                    # where the tumour lies in the head has not changed
        assert np.allclose(image.affine @ [*expected.centre, 1], whole.affine @ [*volumes.centre, 1])
    for name in ('annotation', 'U-Net'):
        table = np.array(named[name].colormap_label.lut).reshape(-1, 4)
        assert [f'#{r:02X}{g:02X}{b:02X}' for r, g, b in table[1:, :3]] == list(CLASS_COLOURS.values()) and table[:, 3].tolist() == [0, 255, 255, 255]
    def strengths(): return {name: v.opacity for name, v in named.items() if v.opacity}
    assert strengths() == {'FLAIR': 1, 'annotation': 0.7}
    over.value = 'U-Net'; below.value = 'T1w'
    assert strengths() == {'T1w': 1, 'U-Net': 0.7}
    over.value = 'none'
    assert strengths() == {'T1w': 1}

def test_nothing_is_written(cohort, tmp_path):
    code = '''if True:
        import os, sys
        from synthmr import viewer                  # matplotlib may write its list of fonts
        viewer.show_volume(sys.argv[1], live=False)._repr_mimebundle_()
        written = []
        def watch(event, arguments):
            if event == 'open' and isinstance(arguments[1], str) and set(arguments[1]) & set('wax+') or event in ('os.mkdir', 'os.rename', 'shutil.copyfile'): written.append(arguments)
        sys.addaudithook(watch)
        viewer.show_volume(sys.argv[1], live=True)._repr_mimebundle_()
        assert not written, written
        open(os.devnull, 'w').close()
        assert len(written) == 1'''                 # the watch works
    subprocess.run([sys.executable, '-c', code, cohort], cwd=tmp_path, check=True)
    assert [*tmp_path.iterdir()] == []

def test_a_real_patient_is_turned_as_nibabel_turns_it(shared):
    for name, subject in find_subjects(shared/'real').items():
        volumes, closest = viewer.from_files(subject), nib.as_closest_canonical(nib.load(subject.files['annotation']))
        labels = np.asanyarray(closest.dataobj)
        assert np.array_equal(volumes.labels['annotation'], np.where(labels == 4, 3, labels)) and np.allclose(volumes.affine, closest.affine)
        assert seen_colours(viewer.show_volume(subject).png) == set(CLASS_COLOURS), name       # in the legend at least

def test_a_segmentation_may_be_a_file(cohort, tmp_path):
    source = find_subjects(cohort)['SIM_00000']
    volume, header = read_volume(source.files['annotation'])
    nib.save(nib.Nifti1Image(np.zeros_like(volume), header.affine), tmp_path/'empty.nii.gz')
    nib.save(nib.Nifti1Image(np.zeros_like(volume), np.eye(4)), tmp_path/'elsewhere.nii.gz')
    assert not viewer.from_files(source, {'empty': tmp_path/'empty.nii.gz'}).labels['empty'].any()
    with pytest.raises(RuntimeError, match='elsewhere.nii.gz'): viewer.from_files(source, {'U-Net': tmp_path/'elsewhere.nii.gz'})

@pytest.fixture(scope='module')
def saved(cohort, tmp_path_factory) -> Path:
    "A notebook saved from a live session: its output holds widget and picture."
    view = viewer.show_volume(cohort, live=True)
    cell = nbformat.v4.new_code_cell('show_volume(...)', outputs=[nbformat.v4.new_output('display_data', view._repr_mimebundle_())])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# A saved session'), cell], metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    path = tmp_path_factory.mktemp('saved')/'index.ipynb'
    nbformat.write(notebook, path)
    return path

def test_a_page_of_the_site_shows_the_picture(saved, tmp_path):
    done = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '-b', 'html', '-c', ROOT/'nbs'/'_site', '-d', tmp_path/'trees', saved.parent, tmp_path/'html'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path/'html'/'index.html').read_text()
    assert '<img' in page and '.png' in page and 'widget' not in page and 'require.min.js' not in page
    assert any(seen_colours(p.read_bytes()) == set(CLASS_COLOURS) for p in (tmp_path/'html'/'_images').glob('*.png'))

def test_a_report_page_shows_the_picture(saved):
    page = as_page(saved)
    assert 'data:image/png;base64' in page and VIEW not in page and 'jupyter-widgets/html-manager' not in page

def test_keeping_a_report_takes_the_widget_and_leaves_the_picture(saved, tmp_path):
    notebook = nbformat.read(saved, as_version=4)
    notebook.metadata.widgets = {STATE: {'state': {}}}
    notebook.cells[1].outputs.append(nbformat.v4.new_output('display_data', {VIEW: {'model_id': 'a progress bar'}, 'text/plain': '0 %'}))
    nbformat.write(notebook, tmp_path/'report.ipynb')
    subprocess.run([sys.executable, ROOT/'nbs'/'_site'/'keep.py', tmp_path], check=True, capture_output=True)
    kept = nbformat.read(tmp_path/'report.ipynb', as_version=4)
    assert 'widgets' not in kept.metadata and [set(o.data) for o in kept.cells[1].outputs] == [{'text/plain', 'image/png'}]

def test_no_committed_notebook_holds_a_widget():
    "A dead widget hides the picture, and its state brings in scripts from elsewhere: run such a notebook without a browser (`make notebooks`)."
    notebooks = [json.loads(p.read_text(encoding='utf-8')) | {'path': p} for folder in ('nbs', 'results') for p in (ROOT/folder).rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    assert [n['path'].name for n in notebooks if 'widgets' in n['metadata'] or any(VIEW in o.get('data', {}) for c in n['cells'] for o in c.get('outputs', []))] == []

def free_port() -> int:
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def test_jupyterlab_shows_the_widget(cohort, browser, tmp_path):
    "A real JupyterLab in a real browser, and nothing is asked of any other machine."
    pytest.importorskip('jupyterlab')
    cell = nbformat.v4.new_code_cell(f'from synthmr.viewer import show_volume\nshow_volume({str(cohort)!r})')
    (tmp_path/'work').mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}), tmp_path/'work'/'lesson.ipynb')
    port, token = free_port(), secrets.token_hex(16)
    own = {name: str(tmp_path/name.lower()) for name in ('JUPYTER_CONFIG_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTER_DATA_DIR', 'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR', 'IPYTHONDIR')}
    with open(tmp_path/'log', 'w') as log:
        lab = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}',
                                f"--ServerApp.root_dir={tmp_path/'work'}", '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'],
                               env={**os.environ, **own, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}, stdout=log, stderr=log)
    page = browser.new_page(viewport={'width': 1300, 'height': 1000})
    try:
        asked = []
        page.on('request', lambda r: asked.append(r.url))
        for _ in range(120):
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token={token}'); break
            except OSError: time.sleep(0.5)
        page.goto(f'http://127.0.0.1:{port}/lab/tree/lesson.ipynb?token={token}&reset')
        page.wait_for_selector('.jp-Notebook', timeout=120_000)
        page.wait_for_selector('text=| Idle', timeout=120_000)
        page.click('.jp-Notebook .jp-Cell')
        page.click('.lm-MenuBar >> text=Run'); page.click('.lm-Menu >> text=Run All Cells')
        page.wait_for_selector('.jp-OutputArea canvas', timeout=120_000)
        def look(wanted: set) -> set:
            "The colours of the classes on the canvas, once they are the wanted ones, or after a minute."
            for _ in range(60):
                found = seen_colours(page.locator('.jp-OutputArea canvas').first.screenshot(), 0.7)
                if found == wanted: break
                page.wait_for_timeout(1000)
            return found
        assert look(set(CLASS_COLOURS)) == set(CLASS_COLOURS)
        assert page.locator('.jp-OutputArea img').count() == 0                  # the widget is shown, and so the picture is not
        page.click('button:has-text("none")'); assert look(set()) == set()
        page.click('button:has-text("FLAIR")'); page.click('button:has-text("annotation")'); assert look(set(CLASS_COLOURS)) == set(CLASS_COLOURS)
        page.screenshot(path=tmp_path/'lab.png')
        assert {u.split('/')[2] for u in asked if u.startswith(('http', 'ws'))} == {f'127.0.0.1:{port}'}
    except Exception: page.screenshot(path=tmp_path/'failed.png'); print((tmp_path/'log').read_text()[-3000:]); raise
    finally: page.close(); lab.terminate(); lab.wait(30)
