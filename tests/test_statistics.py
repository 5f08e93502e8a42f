"Statistics of the study: coverage of intervals, ranks with ties, Holm and sign flips by hand, Spearman against SciPy, exact p-values."
import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test, spearmanr

from synthmr.studies.comparison import judged_table, judged_values, metric_table, rank_table, ranks, relative, summary, trainings
from synthmr.studies.correlation import agreement, assignments, correlations, redrawn, spearman, spearman_p
from synthmr.studies.published import beside_published, published_fidelity, published_summary
from synthmr.studies.statistics import (as_array, holm, intervals, paired_tests, printed_means, rank_stability, relative_means, resampled_means, sign_flip_p,
                                        weighted_means)

def table_of(values: np.ndarray, generators=('real', 'stylegan2', 'stylegan3', 'diffusion'), **other) -> pd.DataFrame:
    "Rows of an array (settings, trainings, subjects, classes)."
    fixed = {'dataset': 'demo', 'segmenter': 'unet', 'augmentation': True} | other
    return pd.DataFrame([{**fixed, 'generator': None if generators[c] == 'real' else generators[c], 'mixture': 'real' if generators[c] == 'real' else 'synthetic', 'seed': 7*k,
                          'subject': f'S{s:03d}', 'class': ('NCR/NET', 'ED', 'ET')[l], 'dice': values[c, k, s, l], 'hausdorff': 50*(1 - values[c, k, s, l])}
                         for c, k, s, l in np.ndindex(values.shape)])

def draw(rng, means, trainings=10, subjects=56, sd=(0.1, 0.02, 0.05)) -> np.ndarray:
    "Dice with effects of subject, training and noise, all normal."
    return (np.array(means)[:, None, None, None] + sd[0]*rng.normal(size=(1, 1, subjects, 1)) + sd[1]*rng.normal(size=(len(means), trainings, 1, 1))
            + sd[2]*rng.normal(size=(len(means), trainings, subjects, 3)))

@pytest.fixture
def rows() -> pd.DataFrame: return table_of(draw(np.random.default_rng(0), [0.8, 0.5, 0.6, 0.7], 4, 12))

def test_estimates_are_those_of_the_comparison(rows):
    rows.loc[5, 'hausdorff'] = np.nan
    table, expected = intervals(rows, 50), summary(relative(trainings(rows)))
    for metric in ('dice_mean', 'hausdorff_mean', 'relative_dice', 'dice_mean_sd'): assert np.allclose(table[metric], expected[metric])
    for metric in ('dice', 'hausdorff'):
        _, values, there = as_array(rows, metric)
        assert np.allclose(resampled_means(values, there, 1)[0], expected[f'{metric}_mean'])

def test_the_order_of_rows_does_not_matter(rows):
    shuffled = pd.concat([part.sample(frac=1, random_state=1) for _, part in rows.groupby('generator', dropna=False, sort=False)])
    pd.testing.assert_frame_equal(intervals(rows, 100), intervals(shuffled, 100))

@pytest.mark.parametrize('change, message', [(lambda r: r[1:], '0 rows of subject S000'), (lambda r: pd.concat([r, r[:1]]), '2 rows of subject S000'),
                                             (lambda r: pd.concat([r, r.assign(dataset='other')]), 'one data set, not demo, other')])
def test_rows_that_do_not_cross_are_refused(rows, change, message): pytest.raises(ValueError, as_array, change(rows)).match(message)

def test_fewer_trainings_in_one_setting(rows):
    some = rows[(rows.generator != 'diffusion') | (rows.seed < 14)]
    _, values, there = as_array(some)
    assert there.sum(axis=1).tolist() == [4, 4, 4, 2] and np.allclose(resampled_means(values, there, 1)[0], summary(trainings(some)).dice_mean)
    one = rows[rows.seed == 0]
    assert np.isfinite(resampled_means(*as_array(one)[1:], 20)).all()

def test_a_replicate_is_the_estimate_of_the_drawn_rows():
    values = draw(np.random.default_rng(1), [0.5, 0.6], 3, 4)
    values[0, 0, 1, 2] = np.nan
    subjects, seeds = np.array([2, 0, 1, 1]), np.array([[2, 1, 0], [0, 0, 3]])
    drawn = [[np.nanmean(np.repeat(values[c, k], subjects, axis=0), axis=0).mean() for k in np.repeat(np.arange(3), seeds[c])] for c in range(2)]
    assert np.allclose(weighted_means(values, subjects[None].astype(float), seeds[None])[0], np.mean(drawn, axis=1))

def test_the_bootstrap_has_the_variance_of_the_mean():
    "Of one source at a time: s^2 / n, for n as small as 3."
    x = np.random.default_rng(2).normal(size=3)
    for over, values in (('trainings', x[None, :, None, None] + np.zeros((1, 3, 2, 3))), ('subjects', x[None, None, :, None] + np.zeros((1, 2, 3, 3)))):
        means = resampled_means(values, np.ones(values.shape[:2], bool), 20000, over=(over,))[1:, 0]
        assert np.isclose(means.var(), x.var(ddof=1)/3, rtol=0.05)

def test_intervals_cover_the_truth_as_often_as_they_say():
    "300 studies of the paper's size, normal in every part; 95 % +- 2.5 standard errors, less what percentiles lack at ten trainings."
    rng, settings = np.random.default_rng(3), pd.DataFrame({'dataset': 'd', 'segmenter': 'u', 'generator': [None, 'g'], 'mixture': ['real', 'synthetic'], 'augmentation': True})
    held = []
    for i in range(300):
        values = draw(rng, [0.8, 0.6])
        means = resampled_means(values, np.ones(values.shape[:2], bool), 300, seed=i)[1:]
        limits = [(0.6, means[:, 1]), (0.75, relative_means(settings, means)[:, 1]), (0.2, means[:, 0] - means[:, 1])]
        held.append([np.quantile(x, 0.025) <= true <= np.quantile(x, 0.975) for true, x in limits])
    assert ((np.mean(held, axis=0) > 0.89) & (np.mean(held, axis=0) < 0.985)).all()

def test_subjects_that_all_settings_share_cancel_in_relative_dice():
    "A subject that doubles every Dice doubles numerator and denominator."
    ease = np.random.default_rng(4).uniform(0.2, 1, 30)
    values = np.array([0.8, 0.4])[:, None, None, None] * ease[None, None, :, None] * np.ones((2, 5, 30, 3))
    settings, values, there = as_array(table_of(values, ('real', 'diffusion')))
    means = resampled_means(values, there, 200)
    assert means[:, 1].std() > 0.01 and np.allclose(relative_means(settings, means)[:, 1], 0.5)

def test_ranks_with_ties():
    table = pd.DataFrame({'dataset': 'd', 'segmenter': 'u', 'augmentation': True, 'generator': list('abcd'), 'dice_mean': [0.5, 0.7, 0.5, 0.1]})
    assert ranks(table, 'dice_mean')[list('abcd')].values.tolist() == [[2.5, 1, 2.5, 4]]
    settings = table.assign(mixture='synthetic')
    stable = rank_stability(settings, np.array([[0.5, 0.7, 0.5, 0.1], [0.5, 0.7, 0.5, 0.1], [0.9, 0.7, 0.5, 0.1]]))
    assert stable['rank'].tolist() == [2.5, 1, 2.5, 4] and stable.rank_1.tolist() == [0.5, 0.5, 0, 0] and stable.rank_3.tolist() == [0.25, 0, 0.75, 0]
    assert rank_stability(settings, np.array([[1., 2, 3, np.nan]]*2), 'lowest').generator.tolist() == list('abc')

@pytest.mark.parametrize('p, adjusted', [([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]), ([0.5, 0.6], [1, 1]), ([0.02], [0.02]), ([0.01, 0.01, 0.03], [0.03, 0.03, 0.03])])
def test_holm_by_hand(p, adjusted): assert np.allclose(holm(p), adjusted)

def test_sign_flips_against_scipy():
    d = np.random.default_rng(5).normal(0.4, 1, (3, 9))
    exact = [permutation_test((x,), np.mean, permutation_type='samples', n_resamples=np.inf).pvalue for x in d]
    assert np.allclose(sign_flip_p(d), exact) and np.allclose(sign_flip_p(d, patterns=500), exact, atol=0.07)

def test_paired_tests_find_the_better_generator(rows):
    tests = paired_tests(rows, replicates=200)
    assert list(zip(tests.generator, tests.other)) == list(itertools.combinations(['stylegan2', 'stylegan3', 'diffusion'], 2))
    assert (tests.difference < 0).all() and (tests.difference_high < 0).all() and (tests.p_holm < 0.01).all() and (tests.p_wilcoxon < 0.01).all()
    assert np.allclose(tests.difference, [-0.1, -0.2, -0.1], atol=0.04) and (tests.difference.between(tests.difference_low, tests.difference_high)).all()
    same = table_of(np.full((3, 2, 5, 3), 0.5), ('real', 'stylegan2', 'diffusion'))
    assert paired_tests(same, replicates=20)[['p', 'p_wilcoxon']].values.tolist() == [[1, 1]]

def test_spearman_against_scipy_with_ties():
    x, y = np.random.default_rng(6).integers(0, 5, (2, 200, 7))
    assert np.allclose(spearman(x, y), [spearmanr(a, b).statistic for a, b in zip(x, y)], equal_nan=True)

@pytest.mark.parametrize('ties', [False, True])
def test_spearman_p_against_scipys_permutations(ties):
    x, y = np.random.default_rng(7).integers(0, 4 if ties else 1000, (2, 6))
    expected = permutation_test((x,), lambda a: spearmanr(a, y).statistic, permutation_type='pairings', n_resamples=np.inf)
    centred = np.mean(np.abs(expected.null_distribution) >= abs(expected.statistic) - 1e-9)
    assert np.isclose(spearman_p(x, y), centred)

def test_p_of_a_mean_correlation_counts_every_permutation():
    "x is permuted alike in all settings."
    x, y = np.random.default_rng(3).normal(size=(2, 3, 5))
    means = [np.mean([spearmanr(a[list(order)], b).statistic for a, b in zip(x, y)]) for order in itertools.permutations(range(5))]
    assert np.isclose(spearman_p(x, y), np.mean(np.abs(means) >= abs(means[0]) - 1e-9))
    assert np.isclose(spearman_p(x[0], y), spearman_p(np.tile(x[0], (3, 1)), y))

def test_agreement_is_spearmans_of_each_ranking():
    table = relative(published_summary())
    found = agreement(beside_published(table[table.dataset == 'brats2020']))
    swin = found[(found.published == 'brats2021') & (found.segmenter == 'swin') & (found.augmentation == True)].iloc[0]     # noqa: E712, '' stands for the mean
    dice = table[(table.segmenter == 'swin') & (table.mixture == 'synthetic') & table.augmentation].pivot(index='generator', columns='dataset', values='relative_dice')
    assert np.isclose(swin.rho, spearmanr(dice.brats2020, dice.brats2021).statistic) and swin.n == 5
    other = found[found.published == 'brats2021']
    assert np.isclose(other.rho.iloc[-1], other.rho.iloc[:-1].mean()) and (other.p >= 1/120 - 1e-12).all()
    assert len(agreement(beside_published(table[(table.dataset == 'brats2020') & (table.mixture != 'synthetic')]))) == 0

def test_the_papers_tables_from_its_own_numbers():
    "Published values in our columns come out as they are printed, in the printed order."
    table = relative(published_summary())
    part = table[table.dataset == 'brats2020'].assign(relative_dice_sd=np.nan)
    dice, hausdorff = metric_table(part), metric_table(part, 'hausdorff')
    assert dice['mean'].iloc[0] == '0.729 ± 0.004' and hausdorff['ED'].iloc[0] == '33.8 ± 3.4' and dice['relative Dice'].iloc[0] == '1.000' and len(dice) == len(hausdorff) == 44
    printed = [f'{m:.3f} ± {s:.3f}' for m, s in zip(part.dice_mean, part.dice_mean_sd)]
    assert dice['mean'].tolist() == printed     # the CSV has the paper's order
    ranked = rank_table(part.sample(frac=1, random_state=0), pd.DataFrame())
    assert ranked.loc[('mean Dice', 'Swin', 'no'), ['Progressive GAN', 'StyleGAN 1', 'StyleGAN 2', 'StyleGAN 3', 'Diffusion']].tolist() == [3.5, 5, 2, 3.5, 1]

def test_undefined_metrics_of_images_are_shown_and_not_ranked():
    judged = pd.DataFrame([{'dataset': 'd', 'generator': g, 'images': i, 'metric': m, 'label': m, 'class': np.nan, 'value': v, 'low': v, 'high': v} for g, x in (('stylegan3', 2.), ('diffusion', 1.))
                           for i in ('synthetic', 'held-out') for m, v in (('frechet_distance', x if i == 'synthetic' else 0.), ('inception_score', np.nan))])
    assert judged_table(judged, ('frechet_distance', 'inception_score')).to_numpy().tolist() == [['2.000 [2.000, 2.000]', '–'], ['1.000 [1.000, 1.000]', '–'], ['0.000 [0.000, 0.000]', '–']]
    assert judged_values(judged).to_dict() == {'frechet_distance': {'stylegan3': 2, 'diffusion': 1, 'held-out': 0}}
    assert rank_table(published_summary().query("mixture == 'real'"), judged).to_numpy().tolist() == [[2, 1]]

def test_assignments_stay_within_groups():
    groups = np.array([0, 1, 0, 1, 0])
    order, exact = assignments(groups)
    assert exact and len(order) == 12 == len(set(map(tuple, order))) and (groups[order] == groups).all()
    drawn, exact = assignments(np.zeros(9), random=100)
    assert not exact and (np.sort(drawn) == np.arange(9)).all() and (drawn == assignments(np.zeros(9), random=100)[0]).all()

def test_random_and_exact_p_agree(monkeypatch):
    x, y = np.random.default_rng(8).normal(size=(2, 8))
    exact = spearman_p(x, y)
    monkeypatch.setattr('synthmr.studies.correlation.EXACT', 1)
    assert abs(spearman_p(x, y) - exact) < 0.01

def test_redrawn_generators_of_a_perfect_order_keep_it():
    again = redrawn(np.arange(5.), np.arange(5.)[None], replicates=5000)
    assert np.nanmin(again) == 1 and 0 < np.isnan(again).mean() < 0.01      # 5 of 3125 draws hold one generator only

def test_published_fid_and_is_against_dice():
    "By hand: FID ranks 2 3 5 4 1 and Dice ranks 4 5 2 3 1 of five generators give squared differences 4 4 9 1 0, so 1 - 6*18/120 = 0.1; Dice itself is higher for a better rank."
    settings, means = printed_means(published_summary(), replicates=200)
    found = correlations(published_fidelity(), 'fid', settings, means)
    first = found.query("scope == 'ranking' and dataset == 'brats2020' and segmenter == 'unet' and augmentation == True").iloc[0]
    assert np.isclose(first.rho, -0.1) and first.n == 5
    each, within = (found[found.scope == s] for s in ('ranking', 'pooled within data sets'))
    assert len(each) == 8 and len(found) == 17 and np.isclose(found.rho.iloc[-1], within.rho.mean()) and found.p.between(2/120, 1).all()

def test_one_data_set_has_no_pooled_rows(rows):
    settings, values, there = as_array(rows)
    found = correlations(pd.DataFrame({'dataset': 'demo', 'generator': ['stylegan2', 'stylegan3', 'diffusion'], 'rad_fid': [3., 2, 1]}), 'rad_fid', settings, resampled_means(values, there, 100))
    assert found.scope.tolist() == ['ranking'] and found.rho.item() == -1 and np.isclose(found.p.item(), 2/6)
