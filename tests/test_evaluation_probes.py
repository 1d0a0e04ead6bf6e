"""Probes against oracles: scikit-learn's logistic regression, naive loops; intervals against their coverage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dist_ssl.evaluation import knn, linear
from dist_ssl.evaluation.intervals import bootstrap_interval, difference, mean_interval, share_interval, summarize
from dist_ssl.evaluation.lbfgs import lbfgs
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
    fitted, ended = fit(rows, standardizer, 10, decays, max_iterations=1000, tolerance=1e-6)
    z = standardizer(torch.from_numpy(x)).numpy()
    assert max(one.gradient_norm for one in ended) < 1e-4  # as far as fp32 goes
    for decay, ours in zip(decays, fitted.numpy(), strict=True):
        theirs = LogisticRegression(C=1 / (decay * 1000), max_iter=10_000, tol=1e-9).fit(z[:1000], y[:1000])
        best = objective(z[:1000], y[:1000], theirs.coef_.T, theirs.intercept_, decay)
        assert objective(z[:1000], y[:1000], ours[:-1], ours[-1], decay) == pytest.approx(best, rel=1e-3)
        same = predict(Rows(x[1000:], y[1000:]), standardizer, torch.from_numpy(ours)[None])[0].numpy()
        assert (same == theirs.predict(z[1000:])).mean() > 0.995
    # Standardising is scikit-learn's too, constant pixels included.
    assert np.abs(z[:1000][:, x[:1000].std(0) == 0]).max() == 0
    assert z[:1000].std(0)[x[:1000].std(0) > 0] == pytest.approx(1, abs=1e-4)


def largest_gradient(x, y, weights, bias, decay):
    logits = x.astype(np.float64) @ weights + bias
    residual = np.exp(logits - logits.max(1, keepdims=True))
    residual /= residual.sum(1, keepdims=True)
    residual[np.arange(len(y)), y] -= 1
    return max(np.abs(x.T @ residual / len(y) + decay * weights).max(), np.abs(residual.mean(0)).max())


def test_a_fit_says_how_it_ended():
    """Out of iterations, or stuck where fp32 finds no descent: neither has converged, whatever it is called."""
    x, y = digits()
    rows = Rows(x[:400], y[:400])
    standardizer = standardize(rows)
    z = standardizer(torch.from_numpy(x[:400])).numpy()
    zero = largest_gradient(z, y[:400], np.zeros((64, 10)), np.zeros(10), 0.0)
    for tolerance, iterations, converged in ((5e-4, 300, True), (5e-4, 3, False), (1e-12, 500, False)):
        weights, (ended,) = fit(rows, standardizer, 10, [1e-2], tolerance=tolerance, max_iterations=iterations)
        assert ended.converged == converged
        assert ended.iterations == 3 if iterations == 3 else ended.iterations < iterations
        expected = largest_gradient(z, y[:400], weights[0, :-1].numpy(), weights[0, -1].numpy(), 1e-2) / zero
        assert ended.gradient_norm == pytest.approx(expected, rel=0.05, abs=1e-6)
        # Begun there, it is measured against zero weights all the same.
        again, (ended,) = fit(rows, standardizer, 10, [1e-2], initial=weights, tolerance=5e-4, max_iterations=0)
        assert torch.equal(again, weights)
        assert ended.converged == (iterations != 3)
    # A gradient that points uphill: no step descends.
    found, gradient, counts = lbfgs(lambda w, active: (w.square().sum(1), -2 * w), torch.ones(2, 3), 50, 1e-3)
    assert torch.equal(found, torch.ones(2, 3))
    assert torch.equal(gradient, torch.full((2, 3), -2.0))
    assert counts == [1, 1]


def test_a_batched_fit_is_each_problem_alone():
    x, y = digits()
    rows = Rows(x[:300], y[:300])
    standardizer = standardize(rows)
    mask = torch.zeros(2, 300)
    mask[0, :200], mask[1, 100:] = 1, 1
    together, _ = fit(rows, standardizer, 10, [1e-2, 1e-1], row_weights=lambda a, b: mask[:, a:b], tolerance=1e-6)
    for number, (part, decay) in enumerate(((slice(0, 200), 1e-2), (slice(100, 300), 1e-1))):
        alone, _ = fit(Rows(x[part], y[part]), standardizer, 10, [decay], tolerance=1e-6)
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


@pytest.mark.slow
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


def test_a_share_has_wilsons_interval_and_seeds_narrow_it():
    for right, images in ((80, 80), (79, 80), (0, 12), (700, 1000)):
        wilson = binomtest(right, images).proportion_ci(method="wilson")
        assert share_interval(np.arange(images) < right) == pytest.approx(tuple(wilson), abs=1e-6)
    generator = np.random.default_rng(0)
    for chance in (0.5, 0.9, 0.99):
        covered, widths = 0, []
        for _ in range(400):  # 80 images of unlike difficulty, three seeds each
            difficulty = np.clip(generator.normal(chance, 0.02, 80), 0, 1)
            answers = generator.random((3, 80)) < difficulty
            low, high = summarize(answers)["interval"]
            covered += low <= chance <= high
            widths.append((high - low) / np.subtract(*share_interval(answers[0])[::-1]))
        assert covered >= 370, chance  # 95% of 400, give or take
        assert np.mean(widths) < (0.65 if chance == 0.5 else 1.0)
    # One answer of one seed wrong is no more certain than all right.
    assert share_interval(np.array([2 / 3] + [1] * 79))[0] < share_interval(np.ones(80))[0]
    low, high = difference(np.ones(80), np.ones(80))["interval"]
    assert -0.05 < low < -0.02 < 0.02 < high < 0.05


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
