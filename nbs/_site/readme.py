"""Write the answer into README.md, its table and its figure, from the study that the paper shows.

    python nbs/_site/readme.py          `make keep` does
"""
from pathlib import Path

import matplotlib.pyplot as plt

from synthmr import figures, plots
from synthmr.studies.findings import Findings, alone, answer_table, listed, published_alone, shown

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = '<!-- answer: written by nbs/_site/readme.py -->', '<!-- answer ends -->'

def answer(found: Findings) -> str:
    "The answer as README says it, in Markdown."
    table = answer_table(found)
    columns = [f'{data}, {segmenter}' for data, segmenter in table.columns]
    rows = [f"| {generator} | {' | '.join(values)} |" for generator, values in zip(table.index, table.to_numpy())]
    weak = [plots.GENERATOR_NAMES[g] for g, v in alone(found).groupby('generator', sort=False).relative_dice.mean().items() if v < 0.5]
    mixed = found.limits[(found.limits.mixture == 'both') & found.limits.augmentation.astype(bool)]
    helped = int((mixed.relative_dice_low > 1).sum())
    trained, figure = found.means[found.means.mixture == 'synthetic'].n.min(), (found.folder/'answer.svg').relative_to(ROOT).as_posix()
    return '\n'.join([f'![Relative Dice of each generator, published and here]({figure})', '', f"| relative Dice | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}", *rows, '',
                      f"Segmenters that learnt from synthetic images only, with augmentation. Published: BraTS, 256x256. Here: **{found.patients}**, {found.size}x{found.size}, {trained} trainings, in brackets 95 % intervals over test subjects and trainings; [{found.file.stem}]({found.file.with_suffix('.ipynb').relative_to(ROOT).as_posix()}).",
                      f"Beside all real images, synthetic ones help {f'in {helped}' if helped else 'in none'} of {len(mixed)} settings, as far as intervals tell" + (f"; {listed(weak)} keep less than half of the Dice." if weak else '.')])

def with_answer(readme: str, found: Findings) -> str:
    "README with the answer in its place."
    before, _, rest = readme.partition(BEGIN)
    return f'{before}{BEGIN}\n{answer(found)}\n{END}{rest.partition(END)[2]}'

def draw(found: Findings) -> Path:
    "The figure, as a file beside the results; the same bytes every time."
    plots.use_style()
    with plt.rc_context({'svg.hashsalt': 'synthmr', 'svg.fonttype': 'none'}):
        figure = figures.stand_ins(published_alone(), alone(found), 'here, SIMULATED' if found.simulated else 'here')
        figure.savefig(path := found.folder/'answer.svg', metadata={'Date': None}, facecolor='white')
    return path

if __name__ == '__main__':
    found, readme = shown(ROOT/'results'), ROOT/'README.md'
    readme.write_text(with_answer(readme.read_text(encoding='utf-8'), found), encoding='utf-8')
    print(f'{readme.name}: the answer of {found.file.stem}, with {draw(found).name}')
