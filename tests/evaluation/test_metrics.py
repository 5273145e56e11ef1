import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error

from mta.data.tasks import load_task
from mta.evaluation.metrics import Answers, from_scores, measure, median_labels
from mta.evaluation.reports.summary import judge
from mta.evaluation.statistics import Interval, bootstrap, resample

RATING, TAG, HEADLINE = load_task("movielens-rating"), load_task("lamp2"), load_task("lamp4")


def drawn(task, queries=40, seed=0):
    """Random label scores and random true answers."""
    generator = torch.Generator().manual_seed(seed)
    labels = task.labels
    scores = 2 * torch.randn(queries, len(labels), generator=generator, dtype=torch.float64)
    return scores, [labels[i] for i in torch.randint(len(labels), (queries,), generator=generator)]


def test_ratings_are_measured_as_sklearn_does():
    scores, golds = drawn(RATING)
    answers = from_scores(RATING, scores)
    found = measure(RATING, answers, golds).metrics
    true, said = [float(g) for g in golds], [float(t) for t in answers.texts]
    medians = [float(m) for m in median_labels(RATING, scores)]
    assert next(iter(found)) == "MAE"
    assert found["MAE"] == pytest.approx(mean_absolute_error(true, said))
    assert found["MAE (median)"] == pytest.approx(mean_absolute_error(true, medians))
    assert found["accuracy"] == pytest.approx(accuracy_score(golds, answers.texts))
    assert found["NLL"] == pytest.approx(log_loss(golds, scores.softmax(1).numpy(), labels=list(RATING.labels)))


def test_tags_are_measured_as_sklearn_does():
    scores, golds = drawn(TAG)
    found = measure(TAG, from_scores(TAG, scores), golds).metrics
    order = sorted(range(len(TAG.labels)), key=lambda i: TAG.labels[i])  # log_loss wants its labels sorted
    shares = scores.softmax(1)[:, order].numpy()
    assert list(found) == ["accuracy", "NLL"]
    assert found["accuracy"] == pytest.approx(accuracy_score(golds, from_scores(TAG, scores).texts))
    assert found["NLL"] == pytest.approx(log_loss(golds, shares, labels=[TAG.labels[i] for i in order]))


def test_without_scores_there_is_no_likelihood():
    assert list(measure(RATING, Answers(["3", "3"]), ["3", "5"]).metrics) == ["MAE", "accuracy"]


@pytest.mark.parametrize(
    ("gold", "text", "shared"),
    [
        ("Привет, большой мир", "большой мир!", 0.8),
        ("हिन्दी में लिखा", "हिन्दी में", 0.8),
        ("天気がいい", "天気", 4 / 7),
        ("Ein Gruß", "ein gruß", 1),
        ("Der Fuß", "der Fuchs", 0.5),  # mostly a-z: words as LaMP has them, here der, fu
    ],
)
def test_words_of_other_scripts_are_counted(gold, text, shared):
    found = measure(load_task("text"), Answers([text]), [gold]).metrics
    assert found["ROUGE-1"] == pytest.approx(shared)
    assert found["ROUGE-L"] == pytest.approx(shared)


@pytest.mark.parametrize(("gold", "distance"), [("1", 4), ("2", 3), ("3", 2), ("4", 3), ("5", 4)])
def test_text_that_is_not_a_number_counts_as_the_farther_extreme(gold, distance):
    assert measure(RATING, Answers(["four stars"]), [gold]).metrics["MAE"] == distance


def test_a_number_outside_the_labels_counts_as_it_is():
    assert measure(RATING, Answers(["7", " 4 "]), ["4", "4"]).metrics["MAE"] == 1.5


def test_median_label_has_the_least_expected_error():
    scores, _ = drawn(RATING)
    values = torch.tensor([float(label) for label in RATING.labels], dtype=torch.float64)
    expected = scores.softmax(1) @ (values[:, None] - values[None, :]).abs()  # (queries, answers)
    chosen = torch.tensor([RATING.labels.index(label) for label in median_labels(RATING, scores)])
    assert torch.allclose(expected.gather(1, chosen[:, None])[:, 0], expected.min(1).values)


def test_texts_are_measured_as_rouge_does():
    texts, golds = ["the cat sat", "a dog", "nothing alike"], ["the cat", "A dog!", "other words"]
    found = measure(HEADLINE, Answers(texts), golds).metrics
    from rouge_score.rouge_scorer import RougeScorer  # two seconds to import

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for name, key in (("ROUGE-1", "rouge1"), ("ROUGE-L", "rougeL")):
        assert found[name] == pytest.approx(sum(scorer.score(g, t)[key].fmeasure for g, t in zip(golds, texts)) / 3)
    assert found["ROUGE-1"] == pytest.approx((0.8 + 1 + 0) / 3)  # two of three words, both, none
    assert next(iter(found)) == "ROUGE-L"
    stems = measure(HEADLINE, Answers(["The dogs ran"]), ["A dog runs"]).metrics
    assert (stems["ROUGE-1"], stems["ROUGE-1, stemmed"], stems["ROUGE-L, stemmed"]) == pytest.approx((0, 1 / 3, 1 / 3))


def test_bootstrap_is_fixed_by_its_seed_and_shrinks_with_people():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)
    assert bootstrap(values).mean == pytest.approx(float(values.double().mean()))
    few, many = bootstrap(values), bootstrap(values.repeat(16))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.15)
    assert bootstrap(torch.full((9,), 0.5)) == Interval(0.5, 0.5, 0.5)


def test_bootstrap_without_groups_equals_plain_resampling():
    values = torch.randn(30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    draws = torch.randint(30, (10_000, 30), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(values[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    expected = Interval(float(values.mean()), low, high)
    assert bootstrap(values) == bootstrap(values, groups=[""] * 30)
    assert bootstrap(values) == bootstrap(values, groups=[f"alone-{n}" for n in range(30)]) == expected


def test_bootstrap_draws_people_of_one_group_together():
    values = torch.tensor([0.0, 0.0, 0.0, 6.0])
    found = bootstrap(values, groups=["g", "g", "g", ""])
    assert (found.mean, found.low, found.high) == (1.5, 0.0, 6.0)
    assert bootstrap(values, groups=["g"] * 4) == Interval(1.5, 1.5, 1.5)


def test_bootstrap_intervals_cover_the_mean_of_pairs():
    samples = torch.randn(300, 30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    pairs, groups = samples.repeat_interleave(2, 1), [f"pair-{n // 2}" for n in range(60)]
    found = [bootstrap(sample, seed, times=800, groups=groups) for seed, sample in enumerate(pairs)]
    assert 0.9 <= sum(one.low <= 0 <= one.high for one in found) / len(found) <= 0.98
    naive = [bootstrap(sample, seed, times=800) for seed, sample in enumerate(pairs)]
    assert sum(one.low <= 0 <= one.high for one in naive) / len(naive) < 0.88
    wider = sum(one.high - one.low for one in found) / sum(one.high - one.low for one in naive)
    assert wider == pytest.approx(2**0.5, rel=0.05)


@pytest.mark.parametrize(("seeds", "variance"), [(2, 1), (3, 100), (8, 1)])  # of the mean over seeds; 1 over people
def test_intervals_cover_new_seeds(seeds, variance):
    generator = torch.Generator().manual_seed(7)
    own = torch.randn(300, 1, 60, generator=generator)
    shared = torch.randn(300, seeds, 1, generator=generator) * (variance * seeds / 60) ** 0.5
    samples = (own + shared).double()
    found = [bootstrap(sample, seed, times=800) for seed, sample in enumerate(samples)]
    assert sum(one.low <= 0 <= one.high for one in found) / len(found) >= 0.92
    averaged = [bootstrap(sample.mean(0), seed, times=800) for seed, sample in enumerate(samples)]
    assert sum(one.low <= 0 <= one.high for one in averaged) / len(averaged) < 0.86
    assert all(one.mean == pytest.approx(other.mean) for one, other in zip(found, averaged))


def test_seeds_alone_give_students_interval():
    seeds = torch.tensor([-1.4, -0.5, -0.9], dtype=torch.float64)  # 31 equal people
    found, sem = bootstrap(seeds[:, None].expand(3, 31), times=200_000), float(seeds.std()) / 3**0.5
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((4.303 * sem, 4.303 * sem), rel=0.03)


def test_equal_seeds_add_nothing_to_the_interval():
    values = torch.randn(30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    once, thrice = bootstrap(values), bootstrap(values.expand(3, -1))
    assert once == bootstrap(values[None])
    assert (once.mean, once.low, once.high) == pytest.approx((thrice.mean, thrice.low, thrice.high), abs=0.02)


def test_p_values_are_below_a_level_as_often_as_it_says():
    samples = torch.randn(400, 50, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = [resample(sample, seed, times=500).p for seed, sample in enumerate(samples)]
    assert sum(p < 0.05 for p in found) / len(found) == pytest.approx(0.05, abs=0.03)
    assert sum(p < 0.5 for p in found) / len(found) == pytest.approx(0.5, abs=0.08)
    assert resample(torch.ones(20)).p == pytest.approx(2 / 10_001)
    assert resample(torch.zeros(9)).p == 1.0


def test_few_people_on_one_side_prove_little():
    assert resample(torch.ones(5)).p == 2**-4  # as their signs alone
    assert resample(torch.ones(1)).p == resample(torch.ones(9), groups=["one"] * 9).p == 1.0


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("MAE", -0.2, -0.1, True),
        ("NLL", -0.2, 0.1, False),
        ("RMSE", 0.1, 0.2, False),
        ("accuracy", 0.1, 0.2, True),
        ("ROUGE-1", -0.2, -0.1, False),
        ("accuracy", -0.1, 0.2, False),
    ],
)
def test_better_means_that_the_interval_excludes_zero(metric, low, high, expected):
    assert (judge(metric, Interval((low + high) / 2, low, high), units=2) == "better") is expected
