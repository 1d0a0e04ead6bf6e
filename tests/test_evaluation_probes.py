"""Probes against oracles: scikit-learn's logistic regression, naive loops; intervals against their coverage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dist_ssl.evaluation import knn, linear
from dist_ssl.evaluation.intervals import bootstrap_interval, difference, mean_interval, summarize
from dist_ssl.evaluation.linear import Rows, fit, linear_probe, predict, standardize
from dist_ssl.evaluation.mlp_probe import mlp_log_probabilities
from tests.pool import ranks


def digits() -> tuple[np.ndarray, np.ndarray]:
    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return features[order].astype(np.float32), labels[order]


def objective(x, y, weights, bias, decay):
    logits = x.astype(np.float64) @ weights + bias
    top = logits.max(1)
    log_normalizer = np.log(np.exp(logits - top[:, None]).sum(1)) + top
    return (log_normalizer - logits[np.arange(len(y)), y]).mean() + decay / 2 * (weights**2).sum()


def test_linear_agrees_with_scikit_learn_on_one_objective():
    x, y = digits()
    rows = Rows(x[:1000], y[:1000])
    standardizer = standardize(rows)
    decays = [1e-4, 1e-2, 1.0]
    fitted = fit(rows, standardizer, 10, decays, max_iterations=1000, tolerance=1e-6)
    z = standardizer(torch.from_numpy(x)).numpy()
    for decay, ours in zip(decays, fitted.numpy(), strict=True):
        theirs = LogisticRegression(C=1 / (decay * 1000), max_iter=10_000, tol=1e-9).fit(z[:1000], y[:1000])
        best = objective(z[:1000], y[:1000], theirs.coef_.T, theirs.intercept_, decay)
        assert objective(z[:1000], y[:1000], ours[:-1], ours[-1], decay) == pytest.approx(best, rel=1e-3)
        same = predict(Rows(x[1000:], y[1000:]), standardizer, torch.from_numpy(ours)[None])[0].numpy()
        assert (same == theirs.predict(z[1000:])).mean() > 0.995
    # Standardising is scikit-learn's too, constant pixels included.
    assert np.abs(z[:1000][:, x[:1000].std(0) == 0]).max() == 0
    assert z[:1000].std(0)[x[:1000].std(0) > 0] == pytest.approx(1, abs=1e-4)


def test_a_batched_fit_is_each_problem_alone():
    x, y = digits()
    rows = Rows(x[:300], y[:300])
    standardizer = standardize(rows)
    mask = torch.zeros(2, 300)
    mask[0, :200], mask[1, 100:] = 1, 1
    together = fit(rows, standardizer, 10, [1e-2, 1e-1], row_weights=lambda a, b: mask[:, a:b], tolerance=1e-6)
    for number, (part, decay) in enumerate(((slice(0, 200), 1e-2), (slice(100, 300), 1e-1))):
        alone = fit(Rows(x[part], y[part]), standardizer, 10, [decay], tolerance=1e-6)
        assert torch.allclose(together[number], alone[0], atol=2e-3)


def test_the_sweep_scores_like_scikit_learn_and_blocks_do_not_matter(monkeypatch):
    x, y = digits()
    train, test = Rows(x[:1200], y[:1200]), Rows(x[1200:], y[1200:])
    result = linear_probe(train, test, 10, num_seeds=2, weight_decays=(1e-3, 1e-2, 1e-1))
    standardizer = standardize(train)
    z = standardizer(torch.from_numpy(x)).numpy()
    for correct, decay in zip(result.correct_sn, result.weight_decays, strict=True):
        theirs = LogisticRegression(C=1 / (decay * 1200), max_iter=5000).fit(z[:1200], y[:1200])
        assert correct.mean() == pytest.approx(theirs.score(z[1200:], y[1200:]), abs=0.006)
    monkeypatch.setattr(linear, "BLOCK_BYTES", 4096)
    small = linear_probe(train, test, 10, num_seeds=2, weight_decays=(1e-3, 1e-2, 1e-1))
    assert np.abs(small.correct_sn.mean(1) - result.correct_sn.mean(1)).max() < 0.006


def _probes_on_this_rank(x, y):
    train, test = Rows(x[:1200], y[:1200]), Rows(x[1200:], y[1200:])
    result = linear_probe(train, test, 10, num_seeds=1, weight_decays=(1e-2, 1e-1))
    neighbours = knn.knn_predict(x[1200:], x[:1200], y[:1200], 10)
    return result.correct_sn.mean(), result.weight_decays, neighbours.numpy()


def test_probes_on_three_ranks_are_those_of_one():
    x, y = digits()
    alone = _probes_on_this_rank(x, y)
    for top1, decays, neighbours in ranks(3).run(_probes_on_this_rank, x, y):
        assert top1 == pytest.approx(alone[0], abs=0.004)
        assert decays == alone[1]
        assert (neighbours == alone[2]).all()


def naive_knn(queries, bank, labels, num_classes, k, temperature):
    predicted = []
    for query in queries.astype(np.float64):
        similarity = [row @ query / np.linalg.norm(row) / np.linalg.norm(query) for row in bank.astype(np.float64)]
        votes = np.zeros(num_classes)
        for row in sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]:
            votes[labels[row]] += np.exp(similarity[row] / temperature)
        predicted.append(votes.argmax())
    return np.array(predicted)


@pytest.mark.parametrize("blocks", [(1024, 64 * 2**20), (7, 4 * 64 * 20)])
def test_knn_agrees_with_a_naive_loop(blocks, monkeypatch):
    generator = np.random.default_rng(0)
    bank, queries = generator.normal(size=(300, 64)), generator.normal(size=(50, 64))
    labels = generator.integers(0, 5, 300)
    monkeypatch.setattr(knn, "QUERY_ROWS", blocks[0])
    monkeypatch.setattr(knn, "BANK_BYTES", blocks[1])
    ours = knn.knn_predict(queries, bank, labels, 5, k=20, temperature=0.07).numpy()
    assert (ours == naive_knn(queries, bank, labels, 5, 20, 0.07)).all()
    similarity, rows = knn.nearest(bank, bank, 3)
    assert (rows[:, 0] == torch.arange(300)).all()
    assert (similarity[:, :-1] >= similarity[:, 1:]).all()


def test_bootstrap_interval_covers_and_is_that_of_resampled_indices():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(generator.random(400) < 0.7)
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 198  # 95% of 200, give or take
    values = generator.random(150)
    plain = np.percentile([generator.choice(values, 150).mean() for _ in range(4000)], [2.5, 97.5])
    assert bootstrap_interval(values) == pytest.approx(tuple(plain), abs=0.004)


def test_paired_difference_is_tighter_than_two_intervals():
    generator = np.random.default_rng(0)
    a = generator.random(1000) < 0.8
    b = a & (generator.random(1000) < 0.95)
    paired = difference(a, b)
    assert paired["interval"][0] > 0
    assert paired["interval"][1] - paired["interval"][0] < np.diff(summarize(a)["interval"])[0]
    low, high = mean_interval([0.7, 0.72, 0.74])
    assert (low, high) == pytest.approx((0.72 - 4.303 * 0.02 / 3**0.5, 0.72 + 4.303 * 0.02 / 3**0.5))


def test_mlp_probe_gives_honest_bits():
    generator = np.random.default_rng(0)
    y = generator.integers(0, 4, 1500)
    known = np.eye(4)[y] + 0.05 * generator.normal(size=(1500, 4))
    unknown = generator.normal(size=(1500, 4))
    for features, low, high in ((known, 1.9, 2.001), (unknown, -0.03, 0.02)):
        log_p = mlp_log_probabilities(features[:1000], y[:1000], features[1000:], 4, 2)
        assert log_p.shape == (2, 500, 4)
        assert np.exp(log_p).sum(2) == pytest.approx(1, abs=1e-5)
        bits = 2 + np.take_along_axis(log_p, y[None, 1000:, None].repeat(2, 0), 2).mean() / np.log(2)
        assert low < bits < high
