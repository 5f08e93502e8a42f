"The published tables: numbers worked out by hand, every inconsistency found and nothing else, the command that writes it."
import itertools

import numpy as np
import pandas as pd
import pytest

from synthmr.cli import main
from synthmr.studies.comparison import relative, summary, trainings
from synthmr.studies.published import (ROW, TABLES, beside, beside_published, beside_table, inconsistencies, printed, published_fidelity, published_ranks, published_relative_dice,
                                       published_summary, recomputed, wrong_means, write_published)

GENERATORS = ['progressive_gan', 'stylegan1', 'stylegan2', 'stylegan3', 'diffusion']

@pytest.fixture(scope='module')
def found() -> pd.DataFrame: return inconsistencies()

@pytest.mark.parametrize('name', TABLES)
def test_the_package_carries_the_tables_as_they_were_given(name, shared):
    pd.testing.assert_frame_equal(printed(name), pd.read_csv(shared/'paper'/f'{TABLES[name]}.csv', dtype=str, keep_default_na=False))

def test_an_unknown_table_is_named(): pytest.raises(ValueError, printed, 'table1').match("'table1'; there are fidelity, dice")

@pytest.mark.parametrize('key, percent', [                      # by hand from tables 3 and 4
    (('brats2020', 'unet', 'diffusion', 0, 1), 100*0.730/0.729), (('brats2020', 'unet', 'stylegan1', 0, 0), 100*0.069/0.729),
    (('brats2020', 'swin', 'stylegan3', 0, 0), 100*0.585/0.743), (('brats2021', 'unet', 'stylegan1', 1, 1), 100*0.975/0.795),
    (('brats2021', 'swin', 'diffusion', 1, 0), 100*0.755/0.756)])
def test_relative_dice_by_hand(key, percent):
    share = published_relative_dice(published_summary()).set_index(ROW).relative_dice
    assert len(share) == 80 and share.index.is_unique and np.isclose(share[key], percent)

@pytest.mark.parametrize('key, order', [                        # ranks of GENERATORS, by hand
    (('fid', 'brats2020', '', ''), [2, 3, 5, 4, 1]), (('is', 'brats2021', '', ''), [4, 5, 1, 2, 3]),
    (('dice_mean', 'brats2020', 'unet', 1), [4, 5, 2, 3, 1]), (('dice_mean', 'brats2020', 'swin', 0), [3.5, 5, 2, 3.5, 1]),   # 0.585 twice
    (('hausdorff_mean', 'brats2021', 'unet', 0), [3, 4, 5, 2, 1])])
def test_ranks_by_hand(key, order):
    table = published_ranks(published_summary(), published_fidelity())
    assert table.columns.tolist() == ['metric', 'dataset', 'segmenter', 'augmentation', *GENERATORS] and table.metric.value_counts().to_dict() == {'fid': 2, 'is': 2, 'dice_mean': 8, 'hausdorff_mean': 8}
    rows = {(r.metric, r.dataset, '' if pd.isna(r.segmenter) else r.segmenter, '' if pd.isna(r.augmentation) else r.augmentation): [getattr(r, g) for g in GENERATORS] for r in table.itertuples()}
    assert rows[key] == order

def test_both_known_inconsistencies_are_found(found):
    dice, hausdorff = (found[found.column == c] for c in ('dice_mean', 'hausdorff_mean'))
    assert dice[ROW].values.tolist() == [['brats2021', 'unet', 'stylegan1', '1', '1']] and np.isclose(dice.expected.item(), 0.795)
    assert len(hausdorff) == 44 and set(hausdorff.segmenter) == {'swin'}
    assert np.isclose(dice.relative_dice.item(), 100*0.975/0.795) and np.isclose(dice.relative_dice_expected.item(), 100)

def test_standard_deviations_that_their_classes_exclude(found):
    "Found besides: 0.009 of 0.009, 0.005, 0.009, and 0.006 of 0.002, 0.002, 0.006; with rounding at most 0.0082 and 0.0038."
    sd = found[found.column == 'dice_mean_sd']
    assert sd[ROW].values.tolist() == [['brats2020', 'unet', 'stylegan2', '1', '1'], ['brats2020', 'swin', 'stylegan2', '1', '1']] and len(found) == 1 + 44 + 2

def test_no_false_alarm_whatever_the_rounding():
    "Tables made from exact classes and trainings, then rounded, hold no inconsistency."
    rng = np.random.default_rng(0)
    of = {}
    for metric, scale, digits in (('dice', 1, 3), ('hausdorff', 100, 1)):
        x = np.clip(rng.uniform(0.2, 0.8, (88, 1, 3)) + rng.exponential(0.05, (88, 1, 1))*rng.normal(size=(88, 10, 3)), 0, 1)*scale
        x = np.concatenate([x, x.mean(axis=2, keepdims=True)], axis=2)
        names = [f'{metric}_{c}' for c in ('ET', 'ED', 'NCR_NET', 'mean')]
        numbers = {**dict(zip(names, x.mean(axis=1).T)), **dict(zip((f'{n}_sd' for n in names), x.std(axis=1, ddof=1).T))}
        of[metric] = printed(metric)[ROW].assign(**{k: [repr(float(round(n, digits))) for n in v] for k, v in numbers.items()})
    assert len(inconsistencies(of)) == 0

@pytest.mark.parametrize('name, row, column, value, expected', [
    ('dice', 0, 'dice_mean', '0.728', 0), ('dice', 0, 'dice_mean', '0.727', 1), ('dice', 0, 'dice_mean', '0.730', 1), ('dice', 3, 'dice_mean', '1.2', 1),
    ('hausdorff', 0, 'hausdorff_mean', '23.3', 1), ('hausdorff', 0, 'hausdorff_ET', '500', 3), ('dice', 0, 'dice_ET_sd', '0.6', 2),
    ('reader_study', 2, 'classified_synthetic', '86', 0), ('reader_study', 2, 'classified_synthetic', '87', 1), ('fidelity', 1, 'fid_brats2021', '-1', 1)])
def test_a_changed_number_is_found(found, name, row, column, value, expected):
    text = printed(name)
    text.loc[row, column] = value
    now, key = inconsistencies({name: text}), ['table', *ROW, 'column']
    new = set(now[key].fillna('').itertuples(index=False)) - set(found[key].fillna('').itertuples(index=False))
    assert len(new) == expected

def test_a_recomputed_mean_can_move_a_rank():
    "Swapped on purpose: StyleGAN 2's printed Dice beats diffusion's, its classes do not."
    text = printed('dice')
    at = (text.dataset == 'brats2020') & (text.segmenter == 'unet') & (text.generator == 'stylegan2') & (text.original == '0') & (text.augmentation == '1')
    text.loc[at, 'dice_mean'] = '0.768'
    new = inconsistencies({'dice': text}).query("generator == 'stylegan2' and column == 'dice_mean'")
    assert (new['rank'].item(), new.rank_expected.item()) == (1, 2)
    table = published_summary({'dice': text})
    assert recomputed(table, wrong_means(text, 'dice')).dice_mean.max() < table.dice_mean.max()

def test_beside_joins_every_published_setting():
    "The study's own code makes the reproduced side, from rows."
    mixtures = [('real', None), *itertools.product(('synthetic', 'both'), GENERATORS)]
    rows = pd.DataFrame([{'dataset': 'demo', 'segmenter': 'unet', 'generator': g, 'mixture': m, 'augmentation': a, 'seed': s, 'subject': 'A', 'class': c, 'dice': 0.5 + s/10, 'hausdorff': 9.}
                         for m, g in mixtures for a in (True, False) for s in (0, 1) for c in ('NCR/NET', 'ED', 'ET')])
    both = beside(relative(published_summary()).query("dataset == 'brats2021'"), summary(relative(trainings(rows))))
    unet = both[both.segmenter == 'unet']
    assert len(both) == 44 and len(unet) == 22 and unet.drop(columns='relative_dice_sd_reproduced').notna().all(axis=None)
    assert np.allclose(unet.dice_mean_reproduced, 0.55) and both[both.segmenter == 'swin'].dice_mean_reproduced.isna().all()
    assert unet[(unet.mixture == 'real') & unet.augmentation.astype(bool)].dice_mean_published.item() == 0.795

def as_reproduced(dataset: str) -> pd.DataFrame:
    "A published data set in the place of a reproduction."
    return relative(published_summary()).query('dataset == @dataset')

def test_beside_both_data_sets_of_the_paper():
    both = beside_published(as_reproduced('brats2020'))
    assert both.published.value_counts().to_dict() == {'brats2020': 44, 'brats2021': 44}
    same = both[both.published == 'brats2020']
    assert (same.relative_dice_published == same.relative_dice_reproduced).all() and (same.hausdorff_mean_published == same.hausdorff_mean_reproduced).all()
    assert both[both.doubtful][['published', 'segmenter', 'generator', 'mixture', 'augmentation']].values.tolist() == [['brats2021', 'unet', 'stylegan1', 'both', True]]

def test_beside_as_a_table_in_the_order_of_the_paper():
    table = beside_table(beside_published(as_reproduced('brats2020')))
    assert table.columns.tolist() == list(itertools.product(('relative Dice', 'mean Dice', 'mean Hausdorff (mm)'), ('BraTS 2020', 'BraTS 2021', 'ours')))
    assert [tuple(i) for i in table.index[:7]] == [('U-Net', 'yes', 'yes', g) for g in ('none', 'Progressive GAN', 'StyleGAN 1', 'StyleGAN 2', 'StyleGAN 3', 'Diffusion')] + [('U-Net', 'yes', 'no', 'none')]
    assert table.loc[('Swin', 'no', 'no', 'Diffusion'), [(m, c) for m in ('mean Dice', 'mean Hausdorff (mm)') for c in ('BraTS 2020', 'ours')]].tolist() == ['0.664', '0.664', '20.8', '20.8']
    starred = table[table.map(lambda t: t.endswith('*'))].stack([0, 1], future_stack=True).dropna()
    assert starred.to_dict() == {('U-Net', 'yes', 'yes', 'StyleGAN 1', 'relative Dice', 'BraTS 2021'): '1.226*', ('U-Net', 'yes', 'yes', 'StyleGAN 1', 'mean Dice', 'BraTS 2021'): '0.975*'}
    assert len(table) == 44

def test_a_generator_that_the_paper_lacks_is_left_out():
    ours = as_reproduced('brats2020').replace({'generator': {'stylegan2': 'my_gan'}})
    assert len(beside_published(ours)) == 2 * (44 - 8) and 'my_gan' not in set(beside_published(ours).generator)

def test_the_command_writes_three_tables(tmp_path, capsys):
    assert main(['published', str(tmp_path/'out')]) == 0
    names = ['relative_dice', 'ranks', 'inconsistencies']
    assert capsys.readouterr().out.split() == [str(tmp_path/'out'/f'{n}.csv') for n in names]
    tables = [pd.read_csv(tmp_path/'out'/f'{n}.csv') for n in names]
    assert [len(t) for t in tables] == [80, 20, 47] and tables[0].columns.tolist() == [*ROW, 'relative_dice']
    assert {'table', *ROW, 'column', 'printed', 'expected', 'difference', 'what'} <= set(tables[2])
    before = (tmp_path/'out'/'ranks.csv').read_bytes()
    write_published(tmp_path/'out')
    assert (tmp_path/'out'/'ranks.csv').read_bytes() == before

def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path/'file').write_text('')
    assert main(['published', str(tmp_path/'file')]) == 1 and len(capsys.readouterr().err.splitlines()) == 1
