"Make executed reports small enough for git: progress bars and dead widgets go, pictures get 256 colours. `make keep` after a study whose results are to be committed."
import base64
import io
import os
import sys
from pathlib import Path

import nbformat
from PIL import Image

def small(picture: str) -> str:
    "A PNG with 256 colours, or as it is where it has no more or that saves nothing; both in base64."
    image, out = Image.open(io.BytesIO(base64.b64decode(picture))), io.BytesIO()
    if image.mode == 'P': return picture
    image.convert('RGB').quantize(256).save(out, 'PNG', optimize=True)
    return min(base64.b64encode(out.getvalue()).decode(), picture, key=len)

def without_widgets(notebook: nbformat.NotebookNode):
    "Take out the widgets, which no browser can bring back to life; a picture beside one stays."
    view = 'application/vnd.jupyter.widget-view+json'
    notebook.metadata.pop('widgets', None)
    for cell in notebook.cells:
        if cell.cell_type != 'code': continue
        cell.outputs = [o for o in cell.outputs if view not in o.get('data', {}) or set(o.data) - {view, 'text/plain'}]
        for output in cell.outputs: output.get('data', {}).pop(view, None)

def keep(path: Path) -> int:
    "Shrink one notebook; it keeps its age, since Snakemake goes by it. Returns the bytes saved."
    before, notebook = path.stat(), nbformat.read(path, as_version=4)
    without_widgets(notebook)
    for cell in notebook.cells:
        if cell.cell_type != 'code': continue
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
        for output in cell.outputs:
            if 'image/png' in output.get('data', {}): output.data['image/png'] = small(output.data['image/png'])
    nbformat.write(notebook, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return before.st_size - path.stat().st_size

if __name__ == '__main__':
    notebooks = sorted(Path(sys.argv[1]).glob('*.ipynb'))
    saved = sum(map(keep, notebooks))
    print(f'{len(notebooks)} notebooks, {saved / 1e6:.1f} MB saved, {sum(p.stat().st_size for p in notebooks) / 1e6:.1f} MB left')
