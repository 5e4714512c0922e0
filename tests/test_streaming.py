"""Summaries of streams against the exact thing."""

from __future__ import annotations

import pytest
import torch

from hybrid_predict_trainer.numerics.streaming import CountSketch, LowRankFactors, StreamingPca, sketch_tensors


def stream(num_vectors: int, size: int = 40, rank: int = 12, *, noise: float = 0.05, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    scales = torch.linspace(3, 0.5, rank, dtype=torch.float64)
    latent = torch.randn(num_vectors, rank, generator=g, dtype=torch.float64) * scales
    directions = torch.linalg.qr(torch.randn(size, rank, generator=g, dtype=torch.float64))[0]
    return latent @ directions.mT + noise * torch.randn(num_vectors, size, generator=g, dtype=torch.float64) + 1.0


def test_streaming_pca_agrees_with_incremental_pca() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    data = stream(600)
    ours, theirs = StreamingPca(8), decomposition.IncrementalPCA(n_components=8)
    for block in data.split(30):
        ours.observe(block)
        theirs.partial_fit(block.numpy())
    torch.testing.assert_close(ours.mean, torch.from_numpy(theirs.mean_))
    torch.testing.assert_close(ours.explained_variance, torch.from_numpy(theirs.explained_variance_), rtol=1e-9, atol=0)
    cosines = (ours.directions * torch.from_numpy(theirs.components_)).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(8, dtype=torch.float64))


def test_reconstruction_error_is_what_reconstruction_leaves() -> None:
    data = stream(400)
    pca = StreamingPca(12)
    for block in data[:300].split(20):
        pca.observe(block)
    rest = data[300:]
    left = (rest - pca.reconstruct(pca.transform(rest))).square().sum() / (rest - pca.mean).square().sum()
    assert pca.reconstruction_error(rest) == pytest.approx(float(left), rel=1e-6)
    assert pca.reconstruction_error(rest) < 0.01
    few = StreamingPca(2)
    few.observe(data)
    assert few.reconstruction_error(rest) > 0.3


def test_constant_memory_over_ten_thousand_vectors() -> None:
    pca = StreamingPca(64)
    sizes = set()
    for block in stream(10_000, size=80, rank=70).split(100):
        pca.observe(block)
        sizes.add(pca.memory_bytes())
    assert pca.count == 10_000
    assert len(sizes) == 1
    gram = pca.directions @ pca.directions.mT
    torch.testing.assert_close(gram, torch.eye(64, dtype=torch.float64), atol=1e-9, rtol=0)


def test_pca_round_trip_and_degenerate_streams() -> None:
    data = stream(120)
    whole, half, resumed = StreamingPca(5), StreamingPca(5), StreamingPca(5)
    for block in data.split(20):
        whole.observe(block)
    for block in data[:60].split(20):
        half.observe(block)
    resumed.load_state_dict(half.state_dict())
    for block in data[60:].split(20):
        resumed.observe(block)
    assert torch.equal(whole.directions, resumed.directions)
    constant = StreamingPca(5)
    constant.observe(torch.ones(3, 7))
    constant.observe(torch.ones(3, 7))
    assert constant.reconstruction_error(torch.ones(2, 7)) == 0


def test_coordinates_keep_their_meaning() -> None:
    """Directions turn and change sign from block to block; aligned coordinates of one vector hardly move."""
    pca, probe = StreamingPca(12), stream(20, seed=9)
    assert pca.coordinates(probe).shape == (20, 12)
    assert float(pca.coordinates(probe).abs().max()) == 0
    plain, aligned = [], []
    data = stream(600)[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    for block in data.split(20):
        before = (pca.transform(probe), pca.coordinates(probe)) if pca.count > 100 else None
        pca.observe(block)
        if before is not None:
            plain.append(float((pca.transform(probe) - before[0]).norm() / probe.norm()))
            aligned.append(float((pca.coordinates(probe) - before[1]).norm() / probe.norm()))
    assert max(aligned) < 0.1
    assert max(plain) > 3 * max(aligned)
    left = pca.coordinates(probe) @ pca.rotation @ pca.directions + pca.mean
    torch.testing.assert_close(left, pca.reconstruct(pca.transform(probe)))


def low_rank(g: torch.Generator, shape: tuple[int, int] = (30, 20), rank: int = 4, noise: float = 0.02) -> torch.Tensor:
    m, n = shape
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=g))[0] for size in (m, n))
    return left * torch.linspace(5, 2, rank) @ right.mT + noise * torch.randn(m, n, generator=g) / m**0.5


def test_power_iteration_finds_the_truncated_svd() -> None:
    M = low_rank(torch.Generator().manual_seed(0))
    factors = LowRankFactors(4, feedback=False)
    for _ in range(6):
        ((P, Q),) = factors.observe([M])
    U, s, V = torch.linalg.svd(M, full_matrices=False)
    best = (U[:, :4] * s[:4]) @ V[:4]
    assert float((P @ Q.mT - best).norm() / best.norm()) < 1e-3
    assert float((P @ Q.mT - M).norm()) < 1.001 * float((best - M).norm())


def test_warm_start_beats_a_cold_one() -> None:
    g = torch.Generator().manual_seed(1)
    M = low_rank(g, noise=1.0)
    warm = LowRankFactors(4, feedback=False)
    for _ in range(8):
        ((P, Q),) = warm.observe([M])
    ((P0, Q0),) = LowRankFactors(4, feedback=False).observe([M])
    assert float((P @ Q.mT - M).norm()) < 0.9 * float((P0 @ Q0.mT - M).norm())


def test_error_feedback_loses_nothing() -> None:
    g = torch.Generator().manual_seed(2)
    stream_of = [torch.randn(12, 9, generator=g) for _ in range(60)]
    with_feedback, without = LowRankFactors(2), LowRankFactors(2, feedback=False)
    sums = {True: torch.zeros(12, 9), False: torch.zeros(12, 9)}
    for M in stream_of:
        for factors, key in ((with_feedback, True), (without, False)):
            ((P, Q),) = factors.observe([M])
            sums[key] += P @ Q.mT
    total = sum(stream_of)
    assert float((sums[True] - total).norm() / total.norm()) < 0.8 * float((sums[False] - total).norm() / total.norm())
    torch.testing.assert_close(sums[True] + with_feedback.state_dict()["error"][0], total, atol=1e-4, rtol=1e-4)


def test_energies_are_those_of_the_factors() -> None:
    g = torch.Generator().manual_seed(5)
    tensors = [low_rank(g), torch.randn(3, 7, generator=g)]
    factors = LowRankFactors(4)
    assert factors.energies().shape == (0, 5)
    pairs = factors.observe(tensors)
    for row, M, (P, Q) in zip(factors.energies(), tensors, pairs, strict=True):
        assert float(row.sum()) == pytest.approx(float(M.square().sum()), rel=1e-4)
        assert float(row[-1]) == pytest.approx(float((M - P @ Q.mT).square().sum()), rel=1e-3, abs=1e-6)
        assert row[:-1].tolist() == sorted(row[:-1].tolist(), reverse=True)


def test_factors_take_vectors_and_convolutions() -> None:
    g = torch.Generator().manual_seed(3)
    tensors = [torch.randn(5, generator=g), torch.randn(4, 3, 3, 3, generator=g)]
    (P0, Q0), (P1, Q1) = LowRankFactors(4).observe(tensors)
    torch.testing.assert_close((P0 @ Q0.mT)[:, 0], tensors[0])
    torch.testing.assert_close((P1 @ Q1.mT).view(4, 3, 3, 3), tensors[1], atol=1e-5, rtol=1e-5)  # all of its rank


def test_sketch_is_linear_and_unbiased() -> None:
    g = torch.Generator().manual_seed(4)
    a, noise = torch.randn(700, generator=g), torch.randn(700, generator=g)
    b = 0.6 * a + 0.8 * noise
    split = [a[:100].view(10, 10), a[100:]]
    torch.testing.assert_close(sketch_tensors(split), sketch_tensors([a]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sketch_tensors([a + b]), sketch_tensors([a]) + sketch_tensors([b]), atol=1e-4, rtol=1e-4)
    estimates = torch.stack([sketch_tensors([a], seed=s) @ sketch_tensors([b], seed=s) for s in range(400)])
    exact = float(a @ b)
    spread = float(((a @ a) * (b @ b) + (a @ b) ** 2).sqrt()) / 100**0.5
    assert float(estimates.mean()) == pytest.approx(exact, abs=4 * spread / 400**0.5)
    assert float(estimates.std()) == pytest.approx(spread, rel=0.25)


def test_small_tensors_are_sketched_whole() -> None:
    g = torch.Generator().manual_seed(6)
    tensors = [torch.randn(30, 20, generator=g), torch.randn(7, generator=g), torch.randn((), generator=g)]
    sketch = CountSketch([t.shape for t in tensors], 50)
    found = sketch([t.reshape(-1) for t in tensors])
    torch.testing.assert_close(found.double(), sketch_tensors(tensors, 50), rtol=1e-4, atol=1e-4)


def test_a_sample_estimates_inner_products() -> None:
    """From 1/16 of the numbers; a matrix whose columns differ needs strides that visit all of them."""
    g = torch.Generator().manual_seed(7)
    shapes = [(64, 256), (256, 64), (300,)]
    columns = [torch.randn(s[-1], generator=g) for s in shapes]
    a = [torch.randn(s, generator=g) * c for s, c in zip(shapes, columns, strict=True)]
    b = [0.8 * t + 0.6 * torch.randn(t.shape, generator=g) * c for t, c in zip(a, columns, strict=True)]
    exact = sum(float((u * v).sum()) for u, v in zip(a, b, strict=True))
    size = sum(float(u.square().sum()) for u in a)
    estimates = []
    for seed in range(60):
        sketch = CountSketch(shapes, 100, max_numbers=2048, seed=seed)
        assert sketch.memory_bytes() < 2048 * 16 * 1.1
        estimates.append(float(sketch([t.reshape(-1) for t in a]) @ sketch([t.reshape(-1) for t in b])))
    spread = torch.tensor(estimates).std()
    assert float(torch.tensor(estimates).mean()) == pytest.approx(exact, abs=4 * float(spread) / 60**0.5)
    assert float(spread) < 0.3 * size


def test_factors_that_were_interrupted_at_first_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [torch.randn(5, 4), torch.randn(3), torch.randn(4, 6)]
    factors, calls, qr = LowRankFactors(2), [0], torch.linalg.qr

    def interrupted(M: torch.Tensor) -> object:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return qr(M)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "qr", interrupted)
        with pytest.raises(KeyboardInterrupt):
            factors.observe(matrices)
    assert len(factors.observe(matrices)) == 3
    assert factors.energies().shape == (3, 3)
