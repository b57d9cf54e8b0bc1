"""The pooling study's analysis: paired differences by hand, the bootstrap against slow references, honest words."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score

from geneformer_ray.compute.paired_bootstrap import bootstrap_scores, draw_cells, percentile_interval, weighted_scores
from geneformer_ray.compute.scores import score
from geneformer_ray.manage.pooling_plot import pooling_study_figure
from geneformer_ray.manage.pooling_report import markdown, reading, summarise, write_findings
from geneformer_ray.manage.pooling_study import Findings, Predictions, Study, analyse, read_trial
from geneformer_ray.manage.trials import Trial, write_predictions

LABELS = ["alpha", "beta"]


def predictions(targets: list[int], predicted: list[int], first: int = 0) -> Predictions:
    ids = [f"cell{first + number:03d}" for number in range(len(targets))]
    return Predictions(ids, np.array(targets), np.array(predicted))


def study_of(
    said: dict[tuple[str, int], list[int]], targets: list[int], baseline: list[int], groups: list[str] | None = None
) -> Study:
    """A study without folds: every trial's predictions of the same cells."""
    cells = predictions(targets, targets).cell_ids
    return Study(
        LABELS,
        {
            Trial(pooling, seed): dict.fromkeys(("choose", "report"), predictions(targets, its))
            for (pooling, seed), its in said.items()
        },
        {None: dict.fromkeys(("choose", "report"), predictions(targets, baseline))},
        dict(zip(cells, groups or ["donor"] * len(cells), strict=True)),
    )


def row(table: pd.DataFrame, **values: str) -> pd.Series:
    for column, value in values.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


# ---------------------------------------------------------------------- scores under weights


@given(data=st.data(), cells=st.integers(1, 30), classes=st.integers(1, 4))
@settings(max_examples=100)
def test_weights_count_cells_as_repeating_them_does(data: st.DataObject, cells: int, classes: int) -> None:
    numbers = st.lists(st.integers(0, classes - 1), min_size=cells, max_size=cells)
    target, predicted = np.array(data.draw(numbers)), np.array(data.draw(numbers))
    weight = np.array(data.draw(st.lists(st.integers(0, 3), min_size=cells, max_size=cells)))
    got = weighted_scores(target, predicted, classes, weight[:, None].astype(float))[:, 0]
    truth, said = np.repeat(target, weight), np.repeat(predicted, weight)
    if len(truth) == 0:
        assert np.isnan(got).all()
        return
    present = np.unique(truth)
    f1 = f1_score(truth, said, labels=range(classes), average=None, zero_division=0)
    expected = [
        f1[present].mean(),
        accuracy_score(truth, said),
        *np.where(np.isin(range(classes), present), f1, np.nan),
    ]
    np.testing.assert_allclose(got, expected)


def test_with_weights_of_one_it_is_the_score_of_every_record(rng: np.random.Generator) -> None:
    target, logits = rng.integers(5, size=200), rng.normal(size=(200, 5))
    got = weighted_scores(target, logits.argmax(axis=1), 5, np.ones((200, 1)))[:, 0]
    expected = score(target, logits, list("abcde"))
    assert got[:2].tolist() == pytest.approx([expected["macro_f1"], expected["accuracy"]])
    assert got[2:].tolist() == pytest.approx([one["f1"] for one in expected["per_class"].values()])


# ---------------------------------------------------------------------- the draws


@given(groups=st.lists(st.integers(0, 3), min_size=1, max_size=20), seed=st.integers(0, 9))
@settings(max_examples=60)
def test_a_draw_is_of_whole_groups_then_of_as_many_cells_within(groups: list[int], seed: int) -> None:
    _, group_N = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_N)
    for weight_N in draw_cells(group_N, range(20), seed).T:
        per_group = np.bincount(group_N, weights=weight_N)
        times = per_group / sizes
        assert np.array_equal(times, times.astype(int))
        assert times.sum() == len(sizes)


def test_draws_do_not_depend_on_their_block() -> None:
    group_N = np.array([0, 0, 1, 1, 1, 2])
    whole = draw_cells(group_N, range(10), 3)
    np.testing.assert_array_equal(whole[:, 4:7], draw_cells(group_N, range(4, 7), 3))
    assert not np.array_equal(whole, draw_cells(group_N, range(10), 4))


def test_the_bootstrap_has_the_distribution_that_all_draws_have() -> None:
    """Three cells have 27 equally likely draws: every value's share agrees with their enumeration."""
    target, one, other = np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([0, 0, 0])
    cells = np.arange(3)

    def difference(scores_TMR: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.round(scores_TMR[0, 0] - scores_TMR[1, 0], 9)

    exact = []
    for draw in itertools.product(cells, repeat=3):
        weight = np.bincount(draw, minlength=3)[:, None].astype(float)
        exact.append(np.stack([weighted_scores(target, said, 2, weight) for said in (one, other)]))
    values, counts = np.unique(np.concatenate([difference(its) for its in exact]), return_counts=True)
    drawn = difference(
        bootstrap_scores([cells] * 2, [target] * 2, [one, other], np.zeros(3, int), 2, replicates=20_000, seed=0)
    )
    assert set(np.unique(drawn)) == set(values)
    shares = np.array([(drawn == value).mean() for value in values])
    np.testing.assert_allclose(shares, counts / 27, atol=0.015)


def test_the_bootstrap_pairs_cells_over_classifiers(rng: np.random.Generator) -> None:
    """Two classifiers that err on the same cells differ by nothing on any draw; unpaired draws would spread."""
    target = rng.integers(2, size=50)
    said = np.where(rng.random(50) < 0.7, target, 1 - target)
    order = rng.permutation(50)
    scores = bootstrap_scores(
        [np.arange(50), order], [target, target[order]], [said, said[order]], np.zeros(50, int), 2,
        replicates=100, seed=1,
    )  # fmt: skip
    np.testing.assert_allclose(scores[0], scores[1])
    assert scores[0, 0].std() > 0.01


def test_intervals_leave_out_what_is_no_number() -> None:
    assert percentile_interval(np.array([np.nan, *np.arange(101.0)])) == (2.5, 97.5)
    assert all(np.isnan(percentile_interval(np.array([np.nan]))))


# ---------------------------------------------------------------------- tables

TARGETS = [0, 0, 0, 0, 1, 1, 1, 1]
SAID = {
    ("first_gene", 0): [0, 0, 0, 1, 1, 1, 1, 1],  # 7 right
    ("first_gene", 1): [0, 0, 1, 1, 1, 1, 1, 1],  # 6
    ("mean", 0): [0, 0, 0, 0, 1, 1, 1, 1],  # 8
    ("mean", 1): [0, 0, 0, 0, 1, 1, 1, 0],  # 7
}
BASELINE_SAID = [0, 0, 0, 0, 0, 0, 1, 1]  # 6


@pytest.fixture(scope="module")
def found() -> Findings:
    return analyse(study_of(SAID, TARGETS, BASELINE_SAID), replicates=300)


def test_scores_and_differences_are_what_a_hand_computes(found: Findings) -> None:
    accuracy = row(found.scores, pooling="first_gene", role="reporting", metric="accuracy")
    assert (accuracy["mean"], accuracy["n"], accuracy["baseline"]) == (pytest.approx(6.5 / 8), 2, 0.75)
    assert accuracy["sd"] == pytest.approx(np.std([7 / 8, 6 / 8], ddof=1))
    pair = row(found.differences, pooling="first_gene", other="mean", metric="accuracy")
    # By seed: 7 - 8 and 6 - 7 cells of 8; unpaired, the spread would be that of four different numbers.
    assert (pair["mean"], pair["sd"], pair["n"]) == (pytest.approx(-1 / 8), pytest.approx(0), 2)
    beside = row(found.differences, pooling="mean", other="baseline", metric="accuracy")
    assert (beside["mean"], beside["sd"]) == (pytest.approx(1.5 / 8), pytest.approx(np.std([2 / 8, 1 / 8], ddof=1)))
    alpha = row(found.scores, pooling="first_gene", role="choosing", metric="f1", label="alpha")
    assert alpha["mean"] == pytest.approx((2 * 3 / 7 + 2 * 2 / 6) / 2)


def test_there_is_a_row_for_everything(found: Findings) -> None:
    assert len(found.scores) == 2 * 2 * 4
    assert len(found.differences) == 3 * 4
    assert len(found.trials) == 2 * 4
    assert (found.scores["ci_low"] <= found.scores["ci_high"]).all()


def test_the_interval_is_that_of_a_slow_loop_over_draws(found: Findings) -> None:
    group_N = np.zeros(8, int)
    target = np.array(TARGETS)
    values = []
    for replicate in range(300):
        cells = np.repeat(np.arange(8), draw_cells(group_N, range(replicate, replicate + 1), 0)[:, 0].astype(int))
        macro = {
            trial: f1_score(target[cells], np.array(its)[cells], average="macro", labels=np.unique(target[cells]))
            for trial, its in SAID.items()
        }
        values.append(np.mean([macro["first_gene", seed] - macro["mean", seed] for seed in (0, 1)]))
    pair = row(found.differences, pooling="first_gene", other="mean", metric="macro_f1")
    assert (pair["ci_low"], pair["ci_high"]) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))))


def test_folds_are_paired_with_their_own_cells_and_baseline() -> None:
    trials, baseline, groups = {}, {}, {}
    right = {("cls", 0): 4, ("cls", 1): 3, ("mean", 0): 2, ("mean", 1): 3}
    for fold in (0, 1):
        for (pooling, its), count in right.items():
            if its == fold:
                said = [0] * 2 + [1] * 2
                said[: 4 - count] = [1] * (4 - count)
                for seed in (0, 1):
                    its_cells = predictions([0, 0, 1, 1], said, first=10 * fold)
                    trials[Trial(pooling, seed, fold)] = dict.fromkeys(("choose", "report"), its_cells)
        baseline[fold] = dict.fromkeys(("choose", "report"), predictions([0, 0, 1, 1], [fold] * 4, first=10 * fold))
        groups |= dict.fromkeys((f"cell{10 * fold + number:03d}" for number in range(4)), f"donor{fold}")
    found = analyse(Study(LABELS, trials, baseline, groups), replicates=200)
    pair = row(found.differences, pooling="cls", other="mean", metric="accuracy")
    assert (pair["mean"], pair["n"]) == (pytest.approx((2 / 4 + 0 / 4) / 2), 4)
    # A draw may hold one donor twice and the other not at all: then only its fold speaks.
    assert (pair["ci_low"], pair["ci_high"]) == (pytest.approx(0), pytest.approx(0.75, abs=0.26))
    pooling_study_figure(found)
    assert "2 seeds and 2 folds" in markdown(found)


def test_several_groups_widen_the_interval() -> None:
    """The difference lies in one donor of three alone: cells alone would promise more than donors do."""
    targets = [0, 1] * 60
    wrong = [1 - target if number < 40 else target for number, target in enumerate(targets)]
    said = {(name, seed): its for name, its in (("cls", targets), ("mean", wrong)) for seed in (0, 1)}
    widths = []
    for groups in (["donor"] * 120, ["a"] * 40 + ["b"] * 40 + ["c"] * 40):
        pair = row(
            analyse(study_of(said, targets, targets, groups), replicates=300).differences,
            pooling="cls", other="mean", metric="accuracy",
        )  # fmt: skip
        widths.append(pair["ci_high"] - pair["ci_low"])
    assert widths[1] > 2 * widths[0]


def test_the_order_of_cells_in_a_file_changes_nothing(found: Findings) -> None:
    study = study_of(SAID, TARGETS, BASELINE_SAID)
    turned = {
        trial: {
            role: Predictions(its.cell_ids[::-1], its.targets[::-1], its.predicted[::-1]) for role, its in roles.items()
        }
        for trial, roles in study.trials.items()
    }
    again = analyse(Study(study.labels, turned, study.baseline, study.group_of), replicates=300)
    pd.testing.assert_frame_equal(again.scores, found.scores)
    pd.testing.assert_frame_equal(again.differences, found.differences)


def test_trials_are_read_from_where_finetune_leaves_them(tmp_path: object) -> None:
    trial = Trial("mean", 3, 1)
    logits = np.array([[0.1, 0.9], [2.0, -1.0]], dtype=np.float32)
    for role in ("choose", "report"):
        write_predictions(trial.directory(str(tmp_path)), role, ["a", "b"], np.array([1, 1]), logits)
    found = read_trial(trial, str(tmp_path))["report"]
    assert (found.cell_ids, found.targets.tolist(), found.predicted.tolist()) == (["a", "b"], [1, 1], [1, 0])


# ---------------------------------------------------------------------- words


def differences(**given: tuple[float, float, float, bool]) -> pd.DataFrame:
    rows = []
    for pair, (mean, low, high, apart) in given.items():
        pooling, other = pair.split("_vs_")
        rows.append(
            {
                "pooling": pooling, "other": other, "role": "reporting", "metric": "macro_f1", "label": "",
                "mean": mean, "sd": 0.01, "n": 3, "ci_low": low, "ci_high": high, "told_apart": apart,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def test_words_claim_what_the_numbers_do() -> None:
    text = reading(
        differences(
            first_gene_vs_mean=(-0.02, -0.03, -0.01, True),
            first_gene_vs_cls=(0.004, -0.01, 0.018, False),
            cls_vs_mean=(-0.024, -0.04, -0.002, False),
            mean_vs_baseline=(0.015, 0.005, 0.025, True),
            cls_vs_baseline=(-0.03, -0.05, -0.01, True),
        )
    )
    assert text == (
        "In macro F1 on the reporting cells, mean is 0.020 (0.010 to 0.030) above first_gene; first_gene and cls "
        "cannot be told apart (+0.004, −0.010 to +0.018); cls and mean cannot be told apart (−0.024, −0.040 to "
        "−0.002, and seeds disagree). Beside PCA + logistic regression, mean is 0.015 (0.005 to 0.025) above the "
        "baseline; cls is 0.030 (0.010 to 0.050) below the baseline."
    )


def test_seeds_that_disagree_are_not_told_apart(rng: np.random.Generator) -> None:
    """Ten times better with one seed and a little worse with the other: the mean is no property of the pooling."""
    targets = rng.integers(2, size=400).tolist()

    def with_errors(share: float) -> list[int]:
        return [1 - t if number < share * 400 else t for number, t in enumerate(targets)]

    said = {
        ("cls", 0): with_errors(0.0), ("mean", 0): with_errors(0.2),
        ("cls", 1): with_errors(0.1), ("mean", 1): with_errors(0.08),
    }  # fmt: skip
    found = analyse(study_of(said, targets, targets), replicates=200)
    pair = row(found.differences, pooling="cls", other="mean", metric="accuracy")
    assert pair["ci_low"] > 0
    assert not pair["told_apart"]
    said["cls", 1] = with_errors(0.05)
    found = analyse(study_of(said, targets, targets), replicates=200)
    assert row(found.differences, pooling="cls", other="mean", metric="accuracy")["told_apart"]


def test_tables_figure_and_summary_are_written(found: Findings, tmp_path: object) -> None:
    files = write_findings(found, str(tmp_path))
    again = pd.read_csv(files["pooling_study.csv"], keep_default_na=False)
    assert again["mean"].tolist() == pytest.approx(found.scores["mean"].tolist())
    assert list(pd.read_csv(files["pooling_differences.csv"]).columns) == list(found.differences.columns)
    said = summarise(found)
    assert said["pooling"]["mean"]["accuracy"]["mean"] == pytest.approx(7.5 / 8, abs=1e-4)
    assert said["baseline"]["accuracy"] == 0.75
    text = markdown(found)
    assert "| mean | 0.937 ± 0.090 (" in text
    assert "| first_gene − mean |" in text
