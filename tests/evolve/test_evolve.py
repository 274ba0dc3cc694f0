"""The evolution of masks: operators, fronts, budgets, fitness, and runs that can end at any moment."""

import hashlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("safetensors", reason="safetensors is not installed")

import safetensors.torch

from fastkd import PopulationEvaluator
from fastkd.evolve import (
    ECS,
    GA,
    NSGA2,
    CheckpointError,
    Fitness,
    FitnessError,
    Limits,
    Pymoo,
    Random,
    RankLost,
    Scores,
    Stopped,
    TensorBoard,
    World,
    crowding_distance,
    evolve,
    global_norm,
    hypervolume,
    latency,
    mask_id,
    nondominated,
    nondominated_sort,
    operators,
    pareto,
    uniform_l1,
)
from fastkd.evolve.limits import largest
from fastkd.evolve.ranking import group_norm
from fastkd.models import build_cnn
from fastkd.population import GeneSpace, Group, trace
from fastkd.population.masks import distinct, duplicates, from_hex, packed, to_hex, unpacked
from fastkd.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
needs_pymoo = pytest.mark.skipif(importlib.util.find_spec("pymoo") is None, reason="pymoo is not installed")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def strings(sizes):
    """Genes without a network, for operators."""
    ends = list(itertools.accumulate(sizes))
    groups = [Group(str(k), (), end - size, size) for k, (end, size) in enumerate(zip(ends, sizes, strict=True))]
    return GeneSpace([], [], 0, groups, torch.zeros(sum(sizes), dtype=torch.float64), 0)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 11, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(11 * 4, 9),
        nn.ReLU(),
        nn.Linear(9, 5),
    ).eval()


def images(n=60):
    return torch.randn(n, 1, 6, 6, generator=seeded(1)), torch.randint(5, (n,), generator=seeded(2))


@pytest.fixture(scope="module")
def evaluator(one_thread):
    return PopulationEvaluator(net(), images()[0])


@pytest.fixture(scope="module")
def resnet(one_thread):
    return trace(build_cnn("resnet20", num_classes=10).eval(), torch.zeros(2, 3, 32, 32))


# --- operators ---------------------------------------------------------------------------------------


def drawn(pattern, rows, genes):
    return torch.cat([pattern(which) for which in operators.blocks(rows, genes)])


@pytest.mark.parametrize("genes", [1, 5, 7, 8, 9, 64, 83])
def test_segments(genes, poisoned):
    out = drawn(operators.segment(20_000, strings([genes]), seeded(), CPU), 20_000, genes)
    assert out.shape == (20_000, genes) and out.any(1).all()
    padded = torch.nn.functional.pad(out.int(), (1, 1)).diff(dim=1)
    assert ((padded == 1).sum(1) == 1).all()  # in one piece
    if genes <= 9:
        pairs, counts = torch.stack(((padded == 1).int().argmax(1), (padded == -1).int().argmax(1)), 1).unique(
            dim=0, return_counts=True
        )
        assert len(pairs) == genes * (genes + 1) // 2
        expected = 20_000 / len(pairs)
        assert (counts - expected).abs().max() < 5 * expected**0.5


def test_patterns_of_crossover():
    space = strings([3, 5, 1, 30])
    fair = drawn(operators.fair(4000, space, seeded(), CPU), 4000, 39)
    assert (fair.double().mean(0) - 0.5).abs().max() < 0.05 and len(fair.unique(dim=0)) == 4000
    whole = drawn(operators.groupwise(4000, space, seeded(), CPU), 4000, 39)
    assert len(whole.unique(dim=0)) == 16
    for g in space.groups:
        part = whole[:, g.start : g.start + g.size]
        assert (part.all(1) | ~part.any(1)).all() and abs(float(part.double().mean()) - 0.5) < 0.05


def test_selection_has_its_probabilities():
    score = torch.tensor([0.0, 1, 2, 5, 2], dtype=torch.float64)
    share = lambda at: torch.bincount(at, minlength=5) / len(at)
    near = lambda at, expected: (share(at) - torch.tensor(expected)).abs().max() < 0.01
    assert near(operators.roulette(score, 50_000, seeded()), [0, 0.1, 0.2, 0.5, 0.2])
    assert not (operators.roulette(score, 50_000, seeded()) == 0).any()
    assert near(operators.roulette(score - 3, 50_000, seeded()), [0, 0.1, 0.2, 0.5, 0.2])  # from the smallest
    assert near(operators.roulette(torch.zeros(5), 50_000, seeded()), [0.2] * 5)
    assert near(operators.rank(score, 50_000, seeded()), [1 / 13, 2 / 13, 3 / 13, 4 / 13, 3 / 13])
    assert near(operators.tournament(score, 50_000, seeded()), [1 / 25, 3 / 25, 6 / 25, 9 / 25, 6 / 25])
    assert near(operators.tournament(score, 50_000, seeded(), size=1), [0.2] * 5)


def test_the_last_one_of_the_wheel():
    """Rounding never points past who has a share."""
    score = torch.tensor([0.1] * 10 + [0.0], dtype=torch.float64)
    g = seeded()
    for _ in range(20):
        assert operators.roulette(score, 5000, g).max() == 9


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.2, 1.0])
def test_bits(rate):
    at = operators.bits(300, 500, rate, seeded())
    assert (at.diff() > 0).all() and (not len(at) or (at[0] >= 0 and at[-1] < 150_000))
    assert abs(len(at) - 150_000 * rate) <= 5 * (150_000 * rate * (1 - rate)) ** 0.5
    if rate == 0.2:  # alike everywhere
        assert (torch.bincount(at % 500, minlength=500) / 300 - 0.2).abs().max() < 0.12


def test_bits_by_row():
    rate = torch.tensor([0.0, 0.5, 0.1, 1.0], dtype=torch.float64)
    counts = torch.bincount(operators.bits(4, 20_000, rate, seeded()) // 20_000, minlength=4) / 20_000
    assert counts[0] == 0 and counts[3] == 1 and (counts - rate).abs().max() < 0.02
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 1.5"):
        operators.bits(2, 3, 1.5, seeded())


def test_initial_population():
    half = operators.initial(500, 300, 0.5, seeded())
    assert half.dtype == torch.bool and (half.double().mean(0) - 0.5).abs().max() < 0.12
    assert abs(float(operators.initial(500, 300, 0.9, seeded()).double().mean()) - 0.9) < 0.01
    density = operators.initial(500, 300, "random", seeded()).double().mean(1)
    assert density.min() < 0.05 and density.max() > 0.95 and abs(float(density.mean()) - 0.5) < 0.05


def test_adaptive_rates():
    score = torch.tensor([1.0, 2, 3, 6], dtype=torch.float64)  # mean 3
    assert operators.adaptive_rates(score, score, 0.5).tolist() == pytest.approx([0.5, 0.5, 0.5, 0])
    assert float(operators.adaptive_rates(score, torch.tensor([4.5]), 0.5)) == pytest.approx(0.25)
    assert operators.adaptive_rates(torch.ones(3), torch.ones(3), 0.5).tolist() == [0.5] * 3


def test_packing():
    for genes in (1, 8, 13):
        rows = torch.rand(5, genes, generator=seeded()) < 0.5
        assert torch.equal(unpacked(packed(rows), genes), rows)
    rows = torch.rand(700, 13, generator=seeded()) < 0.9
    assert torch.equal(operators.occurrences(rows), rows.sum(0))


def test_the_codec_of_masks():
    """What records and checkpoints hold, byte for byte."""
    rows = torch.rand(6, 13, generator=seeded()) < 0.5
    rows[4] = rows[1]
    for row in rows:
        bits = "".join("01"[int(x)] for x in row) + "000"
        assert to_hex(row) == f"{int(bits, 2):04x}"
        assert mask_id(row) == hashlib.blake2b(bytes.fromhex(to_hex(row)), digest_size=16).hexdigest()[:12]
        assert torch.equal(from_hex(to_hex(row), 13), row)
    found = distinct(rows)
    assert torch.equal(rows[found.first][found.inverse], rows) and len(found.keys) == 5
    assert [to_hex(row) for row in rows[found.first]] == sorted({to_hex(row) for row in rows})
    assert [key.hex()[:12] for key in found.keys] == [mask_id(row) for row in rows[found.first]]
    assert duplicates(rows).tolist() == [False] * 4 + [True, False]
    assert from_hex("", 0).shape == (0,)
    for text, message in (("a0b", "must be hexadecimal digits, got 'a0b'"), ("a0", "of 13 genes has 2 bytes, got 1")):
        with pytest.raises(ValueError, match=message):
            from_hex(text, 13)


def ecs_in_plain_python(masks, score, generator, copy=0.2, crossover=0.7):
    """One operation after the other, gene by gene; the same draws from the generator."""
    population, genes = masks.shape
    kinds = torch.rand(population - 1, generator=generator, dtype=torch.float64).tolist()
    kinds = ["copy" if u < copy else "cross" if u < copy + crossover else "mutate" for u in kinds]
    used = places = 0
    while places < population - 1:
        places += 2 if kinds[used] == "cross" else 1
        used += 1
    kinds = kinds[:used]

    def wheel(u):
        total = sum(score.tolist())
        for k, f in enumerate(itertools.accumulate(score.tolist())):
            if u * total < f:
                return k

    spins = [wheel(u) for u in torch.rand(2 * used, generator=generator, dtype=torch.float64).tolist()]
    first, second = spins[:used], spins[used:]

    def cuts(kind):
        n = kinds.count(kind)
        a = torch.randint(genes + 1, (n,), generator=generator).tolist()
        b = torch.randint(genes, (n,), generator=generator).tolist()
        return iter([sorted((x, y + (y >= x))) for x, y in zip(a, b, strict=True)])

    crossed, mutated = cuts("cross"), cuts("mutate")
    rows = masks.tolist()
    out = [rows[max(range(population), key=lambda k: (score[k], -k))]]
    for k, kind in enumerate(kinds):
        a, b = rows[first[k]], rows[second[k]]
        if kind == "copy":
            out.append(a)
        elif kind == "cross":
            low, high = next(crossed)
            out.append(a[:low] + b[low:high] + a[high:])
            out.append(b[:low] + a[low:high] + b[high:])
        else:
            low, high = next(mutated)
            out.append(a[:low] + [not x for x in a[low:high]] + a[high:])
    return torch.tensor(out[:population])


def scores_of(score):
    return Scores(score, -score[:, None])


@pytest.mark.parametrize("population, genes", [(2, 3), (9, 8), (32, 50), (33, 131)])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_ecs_is_the_published_algorithm(population, genes, block, poisoned, monkeypatch):
    monkeypatch.setattr(operators, "BLOCK", block)
    space = strings([genes])
    for seed in range(5):
        masks = operators.initial(population, genes, 0.5, seeded(seed))
        before = masks.clone()
        score = torch.rand(population, dtype=torch.float64, generator=seeded(seed))
        a, b = seeded(seed + 9), seeded(seed + 9)
        children = ECS().ask(Limits(space), masks, scores_of(score), a)
        assert torch.equal(children, ecs_in_plain_python(masks, score, b))
        assert torch.equal(a.get_state(), b.get_state()) and torch.equal(masks, before)


def test_both_children_are_kept():
    """Of each pair the genes are only exchanged; of an odd number of places one is left over."""
    masks = operators.initial(9, 40, 0.5, seeded(3))
    score = torch.rand(9, dtype=torch.float64, generator=seeded())
    for by in operators.CROSSOVERS:
        children = ECS(copy=0, crossover=1, mutation=0, crossover_by=by).ask(
            Limits(strings([10] * 4)), masks, scores_of(score), seeded(1)
        )
        assert torch.equal(children[0], masks[score.argmax()])
        sums = {tuple((a.int() + b.int()).tolist()) for a, b in itertools.product(masks, masks)}
        for a, b in zip(children[1::2], children[2::2], strict=True):
            assert tuple((a.int() + b.int()).tolist()) in sums
        assert not torch.equal(children[1], children[2])


@pytest.mark.parametrize(
    "algorithm",
    [
        ECS(elites=3),
        ECS(mutation_by="bit", selection="rank", crossover_by="group"),
        GA(elites=3),
        GA(rates="adaptive", selection="roulette", crossover_by="two_point"),
        NSGA2(),
        Random(),
        GA(genome="widths"),
        GA(genome="widths", rates="adaptive"),
        NSGA2(genome="widths"),
        Random(genome="widths"),
    ],
)
def test_algorithms(algorithm, poisoned, monkeypatch):
    """The same for every block size and on every call with the same seed; elites first."""
    space = strings([40, 3, 60])
    for population in (1, 2, 15):
        masks = operators.initial(population, 103, 0.5, seeded())
        score = torch.rand(population, dtype=torch.float64, generator=seeded())
        scores = Scores(score, torch.stack((-score, masks.double().mean(1)), 1))
        children = algorithm.ask(Limits(space), masks, scores, seeded(5))
        assert children.shape == masks.shape and children.dtype == torch.bool
        with monkeypatch.context() as patch:
            patch.setattr(operators, "BLOCK", 200)
            assert torch.equal(children, algorithm.ask(Limits(space), masks, scores, seeded(5)))
        assert population < 15 or not torch.equal(children, algorithm.ask(Limits(space), masks, scores, seeded(6)))
        elites = min(population, getattr(algorithm, "elites", 0)) if algorithm.name in ("ecs", "ga") else 0
        assert torch.equal(children[:elites], masks[score.argsort(descending=True)[:elites]])


def test_mutation_rate_of_a_ga():
    masks = torch.zeros(400, 50, dtype=torch.bool)
    score = torch.rand(400, dtype=torch.float64, generator=seeded())
    flips = GA(crossover=0, elites=0).ask(Limits(strings([50])), masks, scores_of(score), seeded()).sum()
    assert abs(int(flips) - 400) < 100  # 1 / genes
    assert not GA(crossover=1, rate=0.0).ask(Limits(strings([50])), masks, scores_of(score), seeded()).any()
    adaptive = GA(crossover=0, elites=0, rates="adaptive", selection="rank")
    assert abs(int(adaptive.ask(Limits(strings([50])), masks, scores_of(torch.ones(400)), seeded()).sum()) - 1600) < 200


def test_operators_of_widths():
    a, b = torch.arange(300).view(100, 3), -torch.arange(300).view(100, 3)
    crossed = torch.arange(100) < 60
    first, second = operators.exchanged(a, b, crossed, seeded()).view(100, 2, 3).unbind(1)
    assert torch.equal(first + second, a + b) and torch.equal(first.abs(), a.abs())
    assert torch.equal(first[60:], a[60:]) and torch.equal(second[60:], b[60:])
    swapped = (first != a)[:60]
    assert 60 < int(swapped.sum()) < 120 and bool((swapped.sum(1) == 1).any())
    ones = torch.ones(2000, 5, dtype=torch.float64)
    out = operators.scattered(ones, 0.3, 0.2, seeded())
    changed = out[out != 1].log()
    assert bool((ones == 1).all()) and abs(len(changed) - 3000) < 200
    assert abs(float(changed.mean())) < 0.02 and abs(float(changed.std()) - 0.2) < 0.02
    assert torch.equal(operators.scattered(ones, 0.0, 0.2, seeded()), ones)
    only = operators.scattered(ones, torch.tensor([0.0, 1.0]).repeat(1000), 0.2, seeded())
    assert bool((only[::2] == 1).all()) and bool((only[1::2] != 1).all())


def test_widths_are_bred_at_the_budget(resnet):
    """Of every group the largest by norm; with the GA no factor of more is within the budget; a front goes below it."""
    limits = Limits(resnet, {"macs": 0.5})
    score = torch.rand(30, dtype=torch.float64, generator=seeded())
    spread = {}
    for algorithm in (Random(genome="widths"), GA(genome="widths", elites=0), NSGA2(genome="widths")):
        first = algorithm.initial(limits, 30, 2, seeded(), CPU)
        children = algorithm.ask(limits, first, Scores(score, torch.stack((-score, score), 1)), seeded())
        for masks in (first, children):
            counts = limits.counts(masks)
            assert bool(limits.within(counts).all()) and torch.equal(masks, limits.widest(counts))
            assert len(torch.unique(masks, dim=0)) > 25
        macs = resnet.macs(children) / limits.full["macs"]
        spread[algorithm.name] = float(macs.min()), float(macs.max())
    assert spread["ga"][0] > 0.45 and spread["random"][0] > 0.45 and spread["nsga2"][0] < 0.3 < spread["nsga2"][1]
    given = Random(genome="widths", density=0.9).initial(Limits(resnet), 30, 1, seeded(), CPU)
    assert abs(float(given.double().mean()) - 0.9) < 0.03
    free = GA(genome="widths").initial(Limits(resnet), 30, 1, seeded(), CPU).double().mean(1)
    assert free.min() < 0.3 and free.max() > 0.7  # all sizes


def test_a_weighed_cost_leaves_the_budget_unspent(resnet):
    """Where a smaller network is worth more, the GA over widths goes below the budget; without a weight it is at it."""
    left = []
    for weight in (0.0, 1.0):
        fitness = Fitness(lambda masks: torch.zeros(len(masks)), cost="macs", weight=weight, budget={"macs": 0.5})
        left.append(evolve(resnet, fitness, "ga-widths", 16, 6).best_cost / Limits(resnet).full["macs"])
    assert left[0] > 0.45 and left[1] < 0.1


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: ECS(copy=0.5), r"copy \+ crossover \+ mutation must be 1, got 0.5 \+ 0.7 \+ 0.1"),
        (lambda: ECS(selection="best"), "selection must be one of roulette, rank, tournament, got 'best'"),
        (lambda: ECS(mutation_by="x"), "mutation_by must be one of segment, bit, got 'x'"),
        (lambda: GA(crossover_by="one"), "crossover_by must be one of two_point, uniform, group, got 'one'"),
        (lambda: GA(rates="x"), "rates must be one of constant, adaptive"),
        (lambda: GA(rate=2), r"rate must be in \[0, 1\], got 2"),
        (lambda: GA(elites=-1), "elites must be at least 0, got -1"),
        (lambda: Random(density="half"), "density must be one of random, got 'half'"),
        (lambda: NSGA2(genome="width"), "genome must be one of filters, widths, got 'width'"),
        (lambda: GA(spread=-1), r"spread must be in \[0, 10\], got -1"),
    ],
)
def test_wrong_options(make, told):
    with pytest.raises(ValueError, match=told):
        make()


# --- fronts ------------------------------------------------------------------------------------------


def dominates(a, b):
    return bool((a <= b).all() and (a < b).any())


def fronts_in_plain_python(points):
    out, left, k = torch.full((len(points),), -1), set(range(len(points))), 0
    while left:
        first = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        for i in first:
            out[i] = k
        left, k = left - first, k + 1
    return out


def crowding_in_plain_python(points, front):
    """Deb et al. 2002, crowding-distance-assignment."""
    out = [0.0] * len(points)
    for k in range(int(front.max()) + 1):
        own = (front == k).nonzero()[:, 0].tolist()
        for f in points.T.tolist():
            order = sorted(own, key=lambda i: f[i])
            out[order[0]] = out[order[-1]] = float("inf")
            for low, i, high in zip(order, order[1:], order[2:], strict=False):
                if f[order[-1]] > f[order[0]]:
                    out[i] += (f[high] - f[low]) / (f[order[-1]] - f[order[0]])
    return torch.tensor(out, dtype=torch.float64)


def clouds():
    g = seeded()
    for n, k, ties in itertools.product((1, 2, 40), (1, 2, 3), (False, True)):
        yield (
            torch.randint(5, (n, k), generator=g).double()
            if ties
            else torch.rand(n, k, generator=g, dtype=torch.float64)
        )


def test_fronts_and_crowding():
    for points in clouds():
        front = nondominated_sort(points)
        assert torch.equal(front, fronts_in_plain_python(points))
        torch.testing.assert_close(crowding_distance(points, front), crowding_in_plain_python(points, front))
        first = [i for i in (front == 0).nonzero()[:, 0].tolist() if not (points[:i] == points[i]).all(1).any()]
        assert nondominated(points).tolist() == first
    assert len(nondominated_sort(torch.empty(0, 2))) == len(nondominated_sort(torch.empty(0, 3))) == 0


def area_in_plain_python(points, reference):
    xs = sorted({reference[0], *(x for x in points[:, 0].tolist() if x < reference[0])})
    total = 0.0
    for low, high in itertools.pairwise(xs):
        below = [y for x, y in points.tolist() if x <= low and y < reference[1]]
        total += (high - low) * (reference[1] - min(below)) if below else 0
    return total


def test_hypervolume():
    for points in clouds():
        if points.shape[1] == 2:
            for reference in ([1.0, 1.0], [0.6, 0.8], [5.0, 4.0], [0.0, 0.0]):
                assert hypervolume(points, reference) == pytest.approx(area_in_plain_python(points, reference))
    assert hypervolume(torch.empty(0, 2), [1, 1]) == 0
    assert hypervolume(torch.tensor([[0.25, 0.5]]), [1, 1]) == 0.375
    with pytest.raises(ValueError, match="2 objectives, got 3"):
        hypervolume(torch.zeros(1, 3), [1, 1, 1])
    with pytest.raises(ValueError, match=r"objectives\[1\] is nan"):
        nondominated_sort(torch.tensor([[0.0, 1], [float("nan"), 0]]))


@needs_pymoo
def test_fronts_of_pymoo():
    from pymoo.indicators.hv import HV
    from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    for seed in range(20):
        points = torch.rand(60, 2, generator=seeded(seed), dtype=torch.float64)
        front = nondominated_sort(points)
        for k, rows in enumerate(NonDominatedSorting().do(points.numpy())):
            assert sorted(rows) == (front == k).nonzero()[:, 0].tolist()
            ours = crowding_distance(points, front)[torch.from_numpy(rows)]
            theirs = torch.from_numpy(calc_crowding_distance(points.numpy()[rows])) * 2  # a mean over objectives
            if len(rows) > 1:  # of one alone theirs is 0, and inf in Deb et al.
                torch.testing.assert_close(ours, theirs)
        assert hypervolume(points, [1, 0.9]) == pytest.approx(HV(ref_point=np.array([1, 0.9]))(points.numpy()))


@needs_pymoo
def test_survivors_of_pymoo():
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

    for seed in range(20):
        points = torch.rand(50, 2, generator=seeded(seed), dtype=torch.float64)
        pop = Population.new(X=np.arange(50)[:, None], F=points.numpy(), G=np.zeros((50, 0)), H=np.zeros((50, 0)))
        theirs = RankAndCrowding().do(
            Problem(n_var=1, n_obj=2), pop, n_survive=25, random_state=np.random.default_rng(0)
        )
        front = nondominated_sort(points)
        distance = crowding_distance(points, front)
        # Between equal distances (the two ends of a front) theirs draws.
        ranked = lambda rows: sorted(zip(front[rows].tolist(), distance[rows].tolist(), strict=True))
        assert ranked(pareto.survivors(points, 25)) == ranked(torch.from_numpy(theirs.get("X")[:, 0]))


def test_equal_masks_survive_last():
    points = torch.tensor([[0.0, 1], [0, 1], [1, 0], [2, 2]], dtype=torch.float64)
    masks = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 1]]).bool()
    stay = NSGA2().tell(masks[:2], masks[2:], Scores(-points.sum(1), points))
    assert sorted(stay.tolist()) == [0, 2]
    stay = NSGA2().tell(masks[:1], masks[1:], Scores(-points.sum(1), points))
    assert sorted(stay.tolist()) == [0, 2, 3]


# --- budgets -----------------------------------------------------------------------------------------


def repaired_in_plain_python(space, limits, mask, budget, k_min):
    """Gene by gene, each time with the costs of the whole mask."""
    mask = mask.clone()
    for g in space.groups:
        own = range(g.start, g.start + g.size)
        for gene in sorted(own, key=lambda i: (-space.l1[i], -i)):
            if int(mask[g.start : g.start + g.size].sum()) < min(k_min, g.size):
                mask[gene] = True
    full = {name: int(getattr(space, name)(space.ones(1))) for name in budget}
    of = {i: g for g in space.groups for i in range(g.start, g.start + g.size)}
    place = {}
    for g in space.groups:
        for k, i in enumerate(sorted(range(g.start, g.start + g.size), key=lambda i: (space.l1[i], i))):
            place[i] = (k + 0.5) / g.size
    order = sorted(range(space.num_genes), key=lambda i: (place[i], i))
    for gene in order:
        if all(int(getattr(space, name)(mask)) <= fraction * full[name] for name, fraction in budget.items()):
            break
        g = of[gene]
        own = mask[g.start : g.start + g.size]
        stronger = [i for i in range(g.start, g.start + g.size) if mask[i] and place[i] > place[gene]]
        if mask[gene] and len(stronger) >= k_min and int(own.sum()) > k_min:
            mask[gene] = False
    return mask


@pytest.mark.parametrize(
    "budget, k_min", [({"macs": 0.3}, 1), ({"parameters": 0.25, "macs": 0.5}, 2), ({"filters": 0.5}, 3), ({}, 4)]
)
def test_repair(evaluator, budget, k_min):
    space = evaluator.space
    limits = Limits(space, budget, k_min)
    masks = torch.cat((operators.initial(40, space.num_genes, "random", seeded()), space.ones(1), ~space.ones(1)))
    out = limits.repair(masks)
    for mask, own in zip(masks, out, strict=True):
        assert torch.equal(own, repaired_in_plain_python(space, limits, mask, budget, k_min))
    for name, fraction in budget.items():
        assert (getattr(space, name)(out) <= fraction * limits.full[name]).all()
    assert (limits.counts(out) >= limits.sizes.clamp(max=k_min)).all()
    assert limits.repair(out) is out  # what is allowed stays as it is
    assert torch.equal(limits.repair(masks[5:6]), out[5:6])  # each for itself


@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
def test_repair_of_a_residual_network(resnet, fraction):
    limits = Limits(resnet, {"macs": fraction})
    masks = operators.initial(30, resnet.num_genes, "random", seeded())
    masks[0] = True
    out = limits.repair(masks)
    macs = resnet.macs(out)
    assert (macs <= fraction * limits.full["macs"]).all() and torch.equal(out, resnet.repair(out))
    # No further than needed: with the last one that was removed the budget would not hold.
    over = (resnet.macs(resnet.repair(masks)) > limits.budget["macs"]).nonzero()[:, 0]
    assert fraction == 1 or len(over) > 3
    position = limits.order.argsort()
    for p in over.tolist():
        gone = (masks[p] & ~out[p]).nonzero()[:, 0]
        more = out[p].clone()
        more[gone[position[gone].argmax()]] = True
        assert int(resnet.macs(more)) > limits.budget["macs"]


def scaled_in_plain_python(limits, widths, up):
    """From one factor at which a width changes to the next, while the budgets hold."""
    at = lambda f: torch.tensor(
        [
            min(max(int(w * f + 0.5 + 1e-9), least), size)
            for w, least, size in zip(widths, limits.least.tolist(), limits.sizes.tolist(), strict=True)
        ]
    )
    ends = sorted(
        (k - 0.5) / w for w, size in zip(widths, limits.sizes.tolist(), strict=True) for k in range(1, size + 1)
    )
    steps = torch.stack([at(f) for f in [0, *ends] if up or f <= 1])
    return steps[max(int((~limits.within(steps)).cumsum(0).eq(0).sum()) - 1, 0)]


@pytest.mark.parametrize(
    "budget, k_min", [({"macs": 0.3}, 1), ({"parameters": 0.25, "macs": 0.5}, 2), ({"filters": 0.5}, 3)]
)
@pytest.mark.parametrize("up", [False, True])
def test_widths_scaled_to_a_budget(evaluator, resnet, budget, k_min, up):
    for space in (evaluator.space, resnet):
        limits = Limits(space, budget, k_min)
        widths = torch.rand(20, len(space.groups), dtype=torch.float64, generator=seeded()) * limits.sizes + 0.01
        widths[0] = limits.sizes
        out = limits.scaled(widths, up)
        for own, given in zip(out, widths.tolist(), strict=True):
            assert torch.equal(own, scaled_in_plain_python(limits, given, up))
        assert up or bool((out <= widths.round().maximum(limits.least)).all())
        whole = limits.counts(limits.repair(space.random(20, 0.3)))
        assert up or torch.equal(limits.scaled(whole), whole)  # what is allowed stays as it is
    assert torch.equal(Limits(resnet, k_min=2).scaled(limits.sizes[None] * 9, up), limits.sizes[None])
    assert bool((Limits(resnet, k_min=2).scaled(torch.zeros(1, len(resnet.groups)), up) == 2).all())


def test_the_widest_by_norm(resnet):
    limits, (norm, _) = Limits(resnet), group_norm(resnet)
    counts = limits.counts(resnet.random(20, 0.5))
    masks = limits.widest(counts)
    assert torch.equal(limits.counts(masks), counts)
    for mask in masks:
        for g in resnet.groups:
            own, kept = norm[g.start : g.start + g.size], mask[g.start : g.start + g.size]
            assert kept.all() or not kept.any() or own[kept].min() >= own[~kept].max()


def test_costs_by_counts(evaluator, resnet):
    for space in (evaluator.space, resnet):
        limits = Limits(space)
        masks = space.repair(operators.initial(20, space.num_genes, "random", seeded()))
        for name in ("macs", "parameters", "filters"):
            assert torch.equal(limits.costs(limits.counts(masks), name), getattr(space, name)(masks))
            assert limits.full[name] == int(getattr(space, name)(space.ones(1)))
    with pytest.raises(ValueError, match="a cost must be one of filters, parameters, macs, got 'flops'"):
        space.cost("flops", space.channels(masks))
    model = net()
    assert limits.full["filters"] > 600 and Limits(evaluator.space).full["filters"] == 6 + 11 + 9 + 5
    assert Limits(evaluator.space).full["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_budget_that_no_mask_can_meet(evaluator):
    space = evaluator.space
    with pytest.raises(
        ValueError,
        match=r"budget\['macs'\] = 0.001 \(.*can be met by no mask.*least possible is "
        r"([\d,]+), a fraction of ([\d.]+)",
    ) as caught:
        Limits(space, {"macs": 0.001})
    fraction = float(str(caught.value).split()[-1])
    least = Limits(space, {"macs": fraction}).repair(space.ones(1))
    assert least.sum() == len(space.groups) and f"{int(space.macs(least)):,}" in str(caught.value)
    for budget, told in (
        ({"flops": 0.5}, "budget must be of filters, parameters, macs, got 'flops'"),
        ({"macs": 40}, r"budget\['macs'\] must be in \(0, 1\].*got 40"),
    ):
        with pytest.raises(ValueError, match=told):
            Limits(space, budget)
    with pytest.raises(TypeError, match=r"budget\['macs'\] must be a number, got '40%'"):
        Limits(space, {"macs": "40%"})
    with pytest.raises(ValueError, match="k_min must be at least 1, got 0"):
        Limits(space, k_min=0)


def test_uniform_l1(resnet):
    masks = uniform_l1(resnet, torch.tensor([0.0, 0.5, 1.0]), k_min=2)
    assert masks.shape == (3, resnet.num_genes) and masks[2].all()
    for g in resnet.groups:
        own, l1 = masks[:, g.start : g.start + g.size], resnet.l1[g.start : g.start + g.size]
        assert own.sum(1).tolist() == [2, g.size // 2, g.size]
        assert l1[own[1]].min() >= l1[~own[1]].max()
    assert torch.equal(uniform_l1(resnet, 0.5)[0], masks[1])
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got 2"):
        uniform_l1(resnet, 2)


class Coupled(torch.nn.Module):
    """Whatever a filter can be coupled to."""

    def __init__(self):
        super().__init__()
        conv = torch.nn.Conv2d
        self.a, self.norm = conv(2, 6, 3, padding=1), torch.nn.BatchNorm2d(6)
        self.wise, self.b = conv(6, 6, 3, padding=1, groups=6), conv(6, 6, 1)
        self.fc1, self.fc2 = torch.nn.Linear(6 * 4, 5), torch.nn.Linear(5, 3)

    def forward(self, x):
        y = torch.relu(self.norm(self.a(x)))
        y = y + self.b(self.wise(y))
        return self.fc2(torch.relu(self.fc1(y.flatten(1))))


def test_global_norm():
    torch.manual_seed(0)
    model = Coupled().eval()
    torch.nn.init.uniform_(model.norm.weight)
    space = trace(model, torch.zeros(2, 2, 2, 2))
    s = {name: p.detach().double().square() for name, p in model.named_parameters()}
    # b makes the same channels as a, and a filter of wise is the channel that it reads.
    of_a = [
        s["a.weight"].sum((1, 2, 3)),
        s["norm.weight"],
        s["wise.weight"].sum((1, 2, 3)),
        s["b.weight"].sum((0, 2, 3)),
        s["b.weight"].sum((1, 2, 3)),
        s["fc1.weight"].reshape(5, 6, 4).sum((0, 2)),
    ]
    norms = {"a": torch.stack(of_a).mean(0), "fc1": (s["fc1.weight"].sum(1) + s["fc2.weight"].sum(0)) / 2}
    want = torch.cat([norms[g.name] / norms[g.name].mean() for g in space.groups])
    assert [g.name for g in space.groups] == ["a", "fc1"]
    for count in range(space.num_genes + 1):
        mask = global_norm(space, count / space.num_genes, k_min=0)[0]
        assert torch.equal(mask, want >= want.sort(descending=True).values[count - 1] if count else want > want.max())
    for power in (0.5, 1):  # the channels of a, on which most depends, stay the longest
        own = want * torch.tensor([6.0] * 6 + [2.0] * 5) ** power
        for count in range(1, space.num_genes + 1):
            mask = global_norm(space, count / space.num_genes, k_min=0, coupled=power)[0]
            assert torch.equal(mask, own >= own.sort(descending=True).values[count - 1])
    with pytest.raises(ValueError, match="coupled must be at least 0, got -1"):
        global_norm(space, 0.5, coupled=-1)
    masks = global_norm(space, torch.tensor([0.0, 0.5, 1.0]), k_min=2)
    assert masks.shape == (3, space.num_genes) and masks[2].all() and bool((masks[1] >= masks[0]).all())
    assert Limits(space).counts(masks)[0].tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got -1"):
        global_norm(space, -1)


def test_global_norm_of_shortcuts_with_padding(resnet):
    """Of all that option A couples; the largest that hold a budget are the densest that do."""
    limits = Limits(resnet, {"macs": 0.6})
    density = largest(limits, lambda d: global_norm(resnet, d))
    at, more = global_norm(resnet, torch.tensor([density, density + 1 / 256]))[:, None]
    assert bool(limits.within(limits.counts(at))) and not bool(limits.within(limits.counts(more)))
    kept = limits.counts(at)[0] / limits.sizes
    assert kept.min() < kept.max(), "every layer lost as much"
    assert largest(Limits(resnet), lambda d: global_norm(resnet, d)) == 1


# --- fitness -----------------------------------------------------------------------------------------


def test_fitness(evaluator):
    space, (x, y) = evaluator.space, images()
    masks = space.repair(operators.initial(6, space.num_genes, 0.5, seeded()))
    limits = Limits(space)
    removed = 1 - space.parameters(masks) / limits.full["parameters"]
    for name in ("accuracy", "loss", "agreement"):
        quality = getattr(evaluator, name)(masks, (x, y)) * (-1 if name == "loss" else 1)
        fitness = Fitness(name, [(x[:40], y[:40]), (x[40:], y[40:])], cost="parameters", weight=0.7)
        values = fitness.measure(evaluator, limits, masks)
        full = fitness.full_cost(limits)
        assert torch.equal(values, torch.stack((quality, space.parameters(masks).double()), 1))
        score, objectives = fitness.scores(values, full)
        torch.testing.assert_close(score, quality + 0.7 * removed)
        torch.testing.assert_close(objectives, torch.stack((-quality, 1 - removed), 1))
        other = Fitness(name, (x, y), cost="parameters", weight=0.7, form="cost")
        torch.testing.assert_close(other.scores(values, full).score, quality - 0.7 * (1 - removed))
    alone = Fitness(lambda m: m.sum(1)).measure(space, limits, masks)
    assert alone.shape == (6, 1) and torch.equal(alone[:, 0], masks.sum(1).double())


@pytest.mark.parametrize("quality", ["reconstruction", "lsp"])
def test_qualities_without_labels(evaluator, tmp_path, quality):
    """Larger is better, the full network best; a search with one resumes."""
    x, _ = images()
    fitness = Fitness(quality, [x], cost="macs", budget={"macs": 0.6})
    limits = Limits(evaluator.space)
    masks = torch.cat((evaluator.space.ones(1), uniform_l1(evaluator.space, torch.tensor([0.7, 0.3]))))
    values = fitness.measure(evaluator, limits, masks)[:, 0]
    assert values[0] > values[1:].max()
    assert torch.equal(values, -getattr(evaluator, quality)(masks, [x]))
    whole = evolve(evaluator, fitness, population=6, generations=4, seed=1, checkpoint=tmp_path / "a")
    evolve(evaluator, fitness, population=6, generations=2, seed=1, checkpoint=tmp_path / "b")
    again = evolve(evaluator, fitness, population=6, generations=4, seed=1, checkpoint=tmp_path / "b")
    assert torch.equal(whole.best, again.best) and whole.best_score == again.best_score < 0
    name = next(op.name for op in evaluator.space.ops if op.kind == "conv")
    assert Fitness(quality, [x], layers=[name]).identity()["layers"] == [name]
    assert not torch.equal(Fitness(quality, [x], layers=[name]).measure(evaluator, limits, masks)[:, 0], values)
    with pytest.raises(ValueError, match="layers are for quality"):
        Fitness("accuracy", images(), layers=[name])


def test_latency_as_a_cost(evaluator):
    cost = latency(net(), images()[0], repeats=2)
    assert (cost(evaluator.space.ones(2)) > 0).all()
    result = evolve(evaluator, Fitness("accuracy", images(), cost=cost, weight=0.1), population=3, generations=2)
    assert result.full_cost > 0 and result.front.cost.shape == result.front.score.shape


@pytest.mark.parametrize(
    "make, told",
    [
        (
            lambda: Fitness("f1", images()),
            "quality must be one of accuracy, loss, agreement, reconstruction, lsp, or a callable, got 'f1'",
        ),
        (lambda: Fitness("loss"), "quality = 'loss' needs batches: a fitness split, apart from the validation split"),
        (lambda: Fitness("loss", []), "batches must have at least one batch of the fitness split, got none"),
        (lambda: Fitness(len, images()), "batches are for a quality by name"),
        (lambda: Fitness("loss", images(), cost="flops"), "cost must be one of filters, parameters, macs.*got 'flops'"),
        (lambda: Fitness("loss", images(), weight=1), "weight = 1 needs a cost"),
        (lambda: Fitness("loss", images(), weight=-1, cost="macs"), "weight must be at least 0 and finite, got -1"),
        (lambda: Fitness("loss", images(), form="sum"), "form must be 'removed' or 'cost', got 'sum'"),
        (lambda: Fitness("loss", images(), rotate=61), r"rotate must be in \[1, 60\], the images of batches, got 61"),
        (lambda: Fitness("loss", images(), rotate=0), r"rotate must be in \[1, 60\], the images of batches, got 0"),
        (lambda: Fitness(len, rotate=3), "rotate = 3 is for a quality by name"),
    ],
)
def test_a_wrong_fitness(make, told):
    with pytest.raises(ValueError, match=told):
        make()


class Kept(Random):
    name, replayed = "kept", True


@pytest.mark.parametrize(
    "options, error, told",
    [
        (
            dict(algorithm="cmaes"),
            ValueError,
            "algorithm must be one of ecs, ga, ga-widths, nsga2, nsga2-widths, random, random-widths, or an Algorithm, got 'cmaes'",
        ),
        (
            dict(algorithm="nsga2", fitness=Fitness("loss", images())),
            ValueError,
            "'nsga2' weighs the quality against a cost",
        ),
        (dict(population=0), ValueError, "population must be at least 1, got 0"),
        (dict(generations=2.5), TypeError, "generations must be an int, got 2.5"),
        (dict(fitness="accuracy"), TypeError, "fitness must be a Fitness or a callable, got str"),
        (
            dict(algorithm=Kept(), fitness=Fitness("loss", images(), rotate=9)),
            ValueError,
            "fitness must be without rotate for algorithm 'kept', which keeps scores of other generations, got rotate = 9",
        ),
        (dict(evaluator=3), TypeError, "evaluator must be a PopulationEvaluator.*got int"),
        (dict(fitness=lambda m: m), ValueError, r"quality must return a tensor of shape \[4\], got \[4, 26\]"),
        (dict(fitness=lambda m: 1.0), TypeError, r"quality must return a tensor of shape \[4\], got float"),
    ],
)
def test_wrong_arguments(evaluator, options, error, told):
    with pytest.raises(error, match=told):
        evolve(**{"evaluator": evaluator, "fitness": lambda m: m.sum(1), "population": 4, "generations": 1, **options})


# --- runs --------------------------------------------------------------------------------------------


def fitness_of(**options):
    return Fitness("accuracy", images(), **{"cost": "macs", "weight": 0.2, "budget": {"macs": 0.6}, **options})


def run(evaluator=None, directory=None, generations=6, algorithm="ecs", fitness=None, **options):
    evaluator = evaluator or PopulationEvaluator(net(), images()[0])
    return evolve(evaluator, fitness or fitness_of(), algorithm, 8, generations, **{"checkpoint": directory, **options})


def told(result):
    """All of a result but the time it took."""
    parts = {"best": result.best, "generator": result.generation, "evaluations": result.evaluations}
    for name, own in (("population", result.population), ("front", result.front)):
        parts |= {f"{name}.{k}": v for k, v in vars(own).items()}
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in result.history]
    return parts, history


def assert_same(a, b):
    (parts, history), (others, theirs) = told(a), told(b)
    assert history == theirs
    for name, x in parts.items():
        assert torch.equal(x, others[name]) if isinstance(x, torch.Tensor) else x == others[name], name


ALGORITHMS = ["ecs", "ga", "nsga2", "random", "ga-widths", "nsga2-widths", GA(rates="adaptive", crossover_by="group")]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_runs(evaluator, algorithm):
    result = run(evaluator, algorithm=algorithm)
    assert_same(result, run(evaluator, algorithm=algorithm))
    assert told(result)[1] != told(run(evaluator, algorithm=algorithm, seed=1))[1]
    limits = Limits(evaluator.space, {"macs": 0.6})
    masks = torch.cat((result.population.masks, result.front.masks, result.best[None]))
    assert limits.repair(masks) is masks
    best = [record["best"] for record in result.history]
    assert best == sorted(best) and best[-1] == result.best_score
    assert [record["generation"] for record in result.history] == [1, 2, 3, 4, 5, 6]
    volumes = [record["hypervolume"] for record in result.history]
    assert volumes == sorted(volumes) and 0 < volumes[0] < 1
    accuracy = evaluator.accuracy(result.best[None], images())
    assert float(accuracy) == result.best_quality
    assert float(accuracy + 0.2 * (1 - evaluator.space.macs(result.best) / limits.full["macs"])) == pytest.approx(
        result.best_score
    )
    front = result.front
    assert (front.cost.diff() > 0).all() and (front.quality.diff() > 0).all()
    assert torch.equal(front.cost, evaluator.space.macs(front.masks).double())
    if algorithm == "ecs":  # the elite
        assert float(result.population.score.max()) == result.best_score


# --- other images in every generation ----------------------------------------------------------------


def rotating(n=25, **options):
    x, y = images()
    return Fitness("loss", [(x[:13], y[:13]), (x[13:], y[13:])], rotate=n, **{"cost": "macs", "weight": 0.2, **options})


def part(generation, n=25):
    x, y = images()
    at = (torch.arange(n) + n * (generation - 1)) % len(x)
    return x[at], y[at]


@pytest.mark.parametrize("algorithm", ["ecs", "nsga2"])
def test_each_generation_has_its_own_images(evaluator, algorithm):
    """All that are compared, on the same ones; in the end on all."""
    latest = []
    result = run(evaluator, fitness=rotating(), algorithm=algorithm, callback=latest.append)
    loss = lambda masks, data: -evaluator.loss(masks, data)
    for generation, seen in enumerate(latest, 1):
        own = part(generation)
        for those in (seen.population, seen.front):
            assert torch.equal(those.quality, loss(those.masks, own))
        assert [seen.best_quality] == loss(seen.best[None], own).tolist()
        assert seen.best_score >= float(seen.population.score.max()) and seen.history[-1]["best"] == seen.best_score
        assert (seen.front.quality.diff() > 0).all()
    assert len({seen.history[-1]["mean"] for seen in latest}) == 6
    for those in (result.population, result.front):
        assert torch.equal(those.quality, loss(those.masks, images()))
    assert result.best_quality == float(loss(result.best[None], images()))
    last = latest[-1]
    scores = rotating().scores
    known = torch.cat((last.population.masks, last.front.masks, last.best[None]))
    full = torch.stack((loss(known, images()), evaluator.space.macs(known).double()), 1)
    assert result.best_score == float(scores(full, result.full_cost).score.max())
    assert torch.equal(result.population.masks, last.population.masks) and (result.front.cost.diff() > 0).all()
    assert len(result.seen.ids) == result.evaluations > len(set(result.seen.ids))


def test_survivors_are_measured_anew(evaluator, monkeypatch):
    """Parents beside children in NSGA-II; and nobody twice on the same images."""
    asked, told_of = [], []
    measure, tell = Fitness.measure, NSGA2.tell

    def measured(self, evaluator, limits, masks):
        x = torch.cat([x for x, _ in self.batches])
        at = int((images()[0] == x[0]).flatten(1).all(1).nonzero())
        asked.extend((mask_id(mask), at, len(x)) for mask in masks)
        return measure(self, evaluator, limits, masks)

    def tells(self, masks, children, scores):
        told_of.append((torch.cat((masks, children)), scores.objectives[:, 0]))
        return tell(self, masks, children, scores)

    monkeypatch.setattr(Fitness, "measure", measured)
    monkeypatch.setattr(NSGA2, "tell", tells)
    result = run(evaluator, fitness=rotating(), algorithm="nsga2")
    assert len(asked) == len(set(asked)) == result.evaluations
    assert list(dict.fromkeys((at, n) for _, at, n in asked)) == [
        (0, 25),
        (25, 25),
        (50, 25),
        (15, 25),
        (40, 25),
        (5, 25),
        (0, 60),
    ]
    for generation, (masks, quality) in enumerate(told_of, 1):
        assert torch.equal(quality, evaluator.loss(masks, part(generation)))


@pytest.mark.parametrize("algorithm", ["ecs", "nsga2"])
def test_all_images_in_every_generation(evaluator, algorithm):
    assert_same(
        run(evaluator, fitness=rotating(60), algorithm=algorithm),
        run(evaluator, fitness=rotating(None), algorithm=algorithm),
    )


@pytest.mark.parametrize("quality", ["agreement", "reconstruction", "lsp"])
def test_rotating_without_labels(evaluator, quality):
    fitness = Fitness(quality, [images()[0][:35], images()[0][35:]], rotate=25)
    result = evolve(evaluator, fitness, population=5, generations=4)
    sign = 1 if quality == "agreement" else -1
    assert result.best_quality == sign * float(getattr(evaluator, quality)(result.best[None], images()[0]))
    masks = result.population.masks
    expected = sign * getattr(evaluator, quality)(masks, part(3)[0])
    assert torch.equal(fitness.on(fitness.part(3)).measure(evaluator, Limits(evaluator.space), masks)[:, 0], expected)


@pytest.mark.parametrize("algorithm", ["ecs", "nsga2"])
def test_resumed_while_images_rotate(evaluator, tmp_path, algorithm):
    whole = run(evaluator, fitness=rotating(), algorithm=algorithm)
    with pytest.raises(Stopped):
        run(evaluator, tmp_path, fitness=rotating(), algorithm=algorithm, callback=stopping(3))
    for _ in range(2):  # the second time with nothing left to do
        again = run(directory=tmp_path, fitness=rotating(), algorithm=algorithm)
        assert_same(whole, again)
        assert again.seen.ids == whole.seen.ids and torch.equal(again.seen.quality, whole.seen.quality)
    longer = run(evaluator, fitness=rotating(), algorithm=algorithm, generations=8)
    assert_same(longer, run(directory=tmp_path, fitness=rotating(), algorithm=algorithm, generations=8))
    with pytest.raises(CheckpointError, match=r"fitness.rotate is 25 there and 20 here"):
        run(evaluator, tmp_path, fitness=rotating(20), algorithm=algorithm)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_masks_bred_on_a_gpu(evaluator, algorithm):
    result = run(evaluator, algorithm=algorithm, device="cuda")
    for own in (result, result.population, result.front):
        vars(own).update({k: v.cpu() for k, v in vars(own).items() if isinstance(v, torch.Tensor)})
    assert_same(result, run(evaluator, algorithm=algorithm))


def test_nothing_is_evaluated_twice(evaluator):
    asked = []

    def quality(masks):
        asked.extend(tuple(row) for row in masks.tolist())
        return masks.double() @ torch.arange(26).double()

    result = evolve(evaluator.space, quality, population=20, generations=15)
    assert len(asked) == len(set(asked)) == result.evaluations < 300
    assert result.best_cost is None and result.history[-1]["hypervolume"] is None
    assert torch.equal(result.front.masks, result.best[None])
    rows = torch.tensor(asked)
    first = rows[:20]
    own = lambda m: [(a != b).double().mean() for a, b in itertools.permutations(m, 2)]
    assert result.history[0]["diversity"] == pytest.approx(float(torch.stack(own(first)).mean()))
    assert result.history[0]["mean"] == pytest.approx(float((first.double() @ torch.arange(26).double()).mean()))


@pytest.mark.parametrize("algorithm", ["ecs", "ga"])
def test_evolution_finds_more_than_random_search(algorithm):
    space = strings([30, 30])
    wanted = torch.rand(60, generator=seeded()) < 0.5
    score = lambda masks: (masks == wanted).double().mean(1)
    best = lambda name: [evolve(space, score, name, 30, 40, seed).best_score for seed in range(3)]
    assert min(best(algorithm)) > max(best("random"))


@pytest.mark.parametrize("algorithm", ["ecs", "nsga2"])
def test_given_individuals_come_first(evaluator, tmp_path, algorithm):
    space, seen = evaluator.space, []
    given = uniform_l1(space, torch.linspace(0, 1, 5))
    callback = lambda latest: seen.append(latest.population.masks) if latest.generation == 1 else None
    whole = run(evaluator, tmp_path, algorithm=algorithm, initial=given, callback=callback)
    repaired = Limits(space, {"macs": 0.6}).repair(given)
    assert all((seen[0] == mask).all(1).any() for mask in repaired)
    assert whole.best_score >= float(
        fitness_of()
        .scores(fitness_of().measure(evaluator, Limits(space), repaired), float(Limits(space).full["macs"]))
        .score.max()
    )
    with pytest.raises(CheckpointError, match=r"initial is '.*' there and None here"):
        run(evaluator, tmp_path, algorithm=algorithm)
    with pytest.raises(ValueError, match="initial must have at most population = 8 individuals, got 9"):
        run(evaluator, algorithm=algorithm, initial=space.ones(9))
    with pytest.raises(ValueError, match=r"initial must have shape \[n, 26\], got \[2, 25\]"):
        run(evaluator, algorithm=algorithm, initial=space.ones(2)[:, 1:])


def test_a_cost_without_limits_of_its_own(evaluator):
    """The reference of the hypervolume is then the worst of the first generation."""
    result = run(evaluator, fitness=fitness_of(budget=None, weight=0.0), algorithm="nsga2", generations=8)
    assert result.history[-1]["hypervolume"] > result.history[0]["hypervolume"] > 0
    result = run(evaluator, fitness=Fitness("loss", images(), cost="filters"), algorithm="nsga2", generations=4)
    assert result.best_quality < 0 and result.history[-1]["hypervolume"] >= result.history[0]["hypervolume"] > 0


def test_a_budget_is_stated_once(evaluator, tmp_path):
    """To the search, in its limits, or with the fitness: the same search, and the same checkpoint."""
    plain = lambda **options: Fitness("accuracy", images(), cost="macs", **options)
    limits = Limits(evaluator.space, {"macs": 0.6}, 2)
    stated = [
        dict(fitness=plain(budget={"macs": 0.6}, k_min=2)),
        dict(fitness=plain(), budget={"macs": 0.6}, k_min=2),
        dict(fitness=plain(), limits=limits),
    ]
    results = [run(evaluator, tmp_path, generations=k + 1, **options) for k, options in enumerate(stated)]
    assert_same(results[-1], run(evaluator, generations=3, **stated[0]))
    assert bool(limits.within(limits.counts(results[-1].population.masks)).all())
    for options, message in (
        (dict(fitness=plain(budget={"macs": 0.6}), budget={"macs": 0.6}), "budget must be stated once"),
        (dict(fitness=plain(k_min=2), k_min=2), "k_min must be stated once"),
        (dict(fitness=plain(), limits=limits, budget={"macs": 0.6}), "budget must be stated once, .* and limits"),
        (dict(fitness=plain(), limits=Limits(trace(net(), images()[0]))), "limits must be of the evaluator's space"),
    ):
        with pytest.raises(ValueError, match=message):
            run(evaluator, **options)
    with pytest.raises(TypeError, match="limits must be a Limits or None, got dict"):
        run(evaluator, fitness=plain(), limits={"macs": 0.6})


def test_the_order_of_removal_is_of_the_weights_that_are_loaded():
    """Limits that were made before the weights came repair by these."""
    model = net()
    space = trace(model, images()[0])
    early = Limits(space, {"macs": 0.4})
    torch.manual_seed(1)
    for module in model:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    e = PopulationEvaluator(model, space)
    late = Limits(PopulationEvaluator(model, images()[0]).space, {"macs": 0.4})
    assert early.space is e.space and torch.equal(early.order, late.order)
    assert torch.equal(early.repair(space.ones(1)), late.repair(space.ones(1)))


def test_history_and_curves(evaluator, tmp_path, capsys):
    seen = []
    callbacks = [lambda latest: seen.append(latest.generation)]
    if importlib.util.find_spec("tensorboard"):
        callbacks.append(TensorBoard(tmp_path / "tensorboard"))
    result = run(evaluator, tmp_path / "a", callback=callbacks, progress=True)
    assert seen == [1, 2, 3, 4, 5, 6]
    lines = (tmp_path / "a/history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "checkpoint.safetensors",
        "previous.safetensors",
        "history.jsonl",
    }
    assert "best" in capsys.readouterr().out
    genes = evaluator.space.num_genes
    masks = [np.unpackbits(np.frombuffer(bytes.fromhex(r["mask"]), np.uint8), count=genes) for r in result.history]
    assert np.array_equal(masks[-1].astype(bool), result.best.numpy())
    assert len(result.seen.ids) == len(set(result.seen.ids)) == result.evaluations
    at = result.seen.ids.index(mask_id(result.best))
    assert float(result.seen.quality[at]) == result.best_quality
    assert (result.seen.cost is None) == (result.best_cost is None)
    if len(callbacks) > 1:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard/evolution"))
        events.Reload()
        found = [(e.step, e.value) for e in events.Scalars("best")]
        assert found == [(r["generation"], pytest.approx(r["best"])) for r in result.history]


# --- resuming ----------------------------------------------------------------------------------------


def stopping(after):
    def callback(latest):
        if latest.generation == after:
            os.kill(os.getpid(), signal.SIGTERM)

    return callback


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resumed_is_bit_for_bit_the_unbroken_run(evaluator, tmp_path, algorithm, after):
    whole = run(evaluator, algorithm=algorithm)
    with pytest.raises(Stopped, match=f"stopped after generation {after}; the same command goes on"):
        run(evaluator, tmp_path, algorithm=algorithm, callback=stopping(after))
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == after
    asked = evaluator.stats.asked
    again = run(algorithm=algorithm, directory=tmp_path)
    assert_same(whole, again)
    assert evaluator.stats.asked == asked
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == again.history
    assert_same(whole, run(algorithm=algorithm, directory=tmp_path))  # nothing left to do
    assert_same(
        run(evaluator, algorithm=algorithm, generations=8), run(algorithm=algorithm, directory=tmp_path, generations=8)
    )


def test_killed_at_any_moment(tmp_path):
    """SIGKILL at many moments; each time the next process goes on. They are forks of one, which is quicker."""
    code = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_evolve import *
torch.set_num_threads(1)
kills = 0
while True:
    process = os.fork()
    if process == 0:
        result = run(directory=sys.argv[1], generations=120)
        torch.save(told(result), sys.argv[1] + "/final.pt")
        os._exit(0)
    time.sleep(0.03 + 0.0171 * kills)
    os.kill(process, signal.SIGKILL)
    if os.waitpid(process, 0)[1] == 0:
        break
    kills += 1
print(kills)
"""
    folder = tmp_path / "b"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), os.path.dirname(__file__)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    parts, history = torch.load(folder / "final.pt")
    expected, theirs = told(run(generations=120))
    assert history == theirs
    assert all(
        torch.equal(x, expected[k]) if isinstance(x, torch.Tensor) else x == expected[k] for k, x in parts.items()
    )


def test_a_changed_configuration_is_refused(evaluator, tmp_path):
    run(evaluator, tmp_path, generations=2)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    model = net()
    with torch.no_grad():
        model[0].bias[0] += 1
    x, y = images()
    for options, message in [
        (dict(seed=3), "seed is 0 there and 3 here"),
        (
            dict(algorithm=ECS(copy=0.1, crossover=0.8)),
            "algorithm.copy is 0.2 there and 0.1 here; algorithm.crossover is 0.7 there and 0.8",
        ),
        (
            dict(fitness=fitness_of(weight=0.3, budget={"macs": 0.5})),
            "fitness.weight is 0.2 there and 0.3 here; fitness.budget.macs is 0.6 there",
        ),
        (
            dict(fitness=Fitness("accuracy", (x, 4 - y), cost="macs", weight=0.2, budget={"macs": 0.6})),
            "fitness.data is '.*' there",
        ),
        (dict(evaluator=PopulationEvaluator(model, x)), "evaluator.weights is '.*' there and '.*' here"),
        (dict(generations=1), "has 2 generations already, but generations = 1"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            run(**{"evaluator": evaluator, "directory": tmp_path, "generations": 3, **options})
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def truncated(content):
    return content[:-100]


def flipped(content):
    at = len(content) - 20
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda content: b""])
def test_a_damaged_checkpoint_falls_back(evaluator, tmp_path, damage):
    whole = run(evaluator)
    run(evaluator, tmp_path, generations=4)
    file = tmp_path / "checkpoint.safetensors"
    bad = damage(file.read_bytes())
    file.write_bytes(bad)
    with pytest.warns(
        RuntimeWarning, match=r"checkpoint.safetensors is .*Going on from .*previous.safetensors, generation 3"
    ):
        assert_same(run(evaluator, tmp_path), whole)
    assert (tmp_path / "damaged.safetensors").read_bytes() == bad
    for name in ("checkpoint", "previous"):
        (tmp_path / f"{name}.safetensors").write_bytes(bad)
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors is (no whole|damaged)"):
        run(evaluator, tmp_path)
    assert file.read_bytes() == bad


def test_killed_between_the_two_files(evaluator, tmp_path):
    run(evaluator, tmp_path, generations=4)
    (tmp_path / "checkpoint.safetensors").unlink()
    assert_same(run(evaluator, tmp_path), run(evaluator))


def test_a_full_disk_leaves_the_last_checkpoint(evaluator, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.safetensors"
    kept = []

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    def callback(latest):
        if latest.generation == 3:
            kept.append(file.read_bytes())
            monkeypatch.setattr(safetensors.torch, "save_file", full)

    with pytest.raises(
        CheckpointError, match=r"could not be written .*No space left.* is whole.*goes on from the last"
    ):
        run(evaluator, tmp_path, callback=callback)
    monkeypatch.undo()
    assert [file.read_bytes()] == kept and checkpoint.load(file)[1]["generation"] == 3
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.safetensors", "previous.safetensors", "history.jsonl"}
    assert_same(run(evaluator, tmp_path), run(evaluator))


def test_a_history_that_cannot_be_written(evaluator, tmp_path):
    def callback(latest):
        if latest.generation == 3:
            (tmp_path / "history.jsonl").unlink()
            (tmp_path / "history.jsonl").mkdir()

    with pytest.raises(CheckpointError, match=r"history.jsonl could not be written.*checkpoint.safetensors is whole"):
        run(evaluator, tmp_path, callback=callback)
    (tmp_path / "history.jsonl").rmdir()
    assert_same(run(evaluator, tmp_path), run(evaluator))


def test_a_fitness_that_is_no_number(evaluator, tmp_path):
    calls = []

    def broken(masks):
        calls.append(masks)
        out = masks.double().mean(1)
        if len(calls) == 3:
            out[1] = float("nan")
        return out

    with pytest.raises(
        FitnessError,
        match=r"individual (\d+) of generation 3 \(mask ([0-9a-f]{12}), (\d+) of 26 genes\) has no "
        r"finite fitness: quality = nan; the checkpoint of generation 2 is whole",
    ) as caught:
        evolve(evaluator.space, broken, "random", 8, 6, checkpoint=tmp_path)
    assert f"{int(calls[2][1].sum())} of 26 genes" in str(caught.value)
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")[1]["generation"] == 2
    resumed = evolve(evaluator.space, broken, "random", 8, 6, checkpoint=tmp_path)
    assert_same(resumed, evolve(evaluator.space, broken, "random", 8, 6))
    with pytest.raises(FitnessError, match=r"generation 1 .*quality = inf$"):
        evolve(evaluator.space, lambda m: m.sum(1) / 0, "random", 8, 6)


def test_ctrl_c(evaluator, tmp_path):
    """The generation is finished, and a checkpoint written."""

    def callback(latest):
        if latest.generation == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    with pytest.raises(Stopped, match="stopped after generation 2"):
        run(evaluator, tmp_path, callback=callback)
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")[1]["generation"] == 2
    assert signal.getsignal(signal.SIGINT) is before


# --- pymoo -------------------------------------------------------------------------------------------


def from_pymoo(**options):
    from pymoo.algorithms.moo.nsga2 import NSGA2 as Theirs
    from pymoo.operators.crossover.ux import UX
    from pymoo.operators.mutation.bitflip import BitflipMutation
    from pymoo.operators.sampling.rnd import BinaryRandomSampling

    return Theirs(pop_size=8, sampling=BinaryRandomSampling(), crossover=UX(), mutation=BitflipMutation(), **options)


@needs_pymoo
def test_an_algorithm_of_pymoo(evaluator, tmp_path):
    theirs = Pymoo(from_pymoo())
    whole = run(evaluator, algorithm=theirs)
    assert_same(whole, run(evaluator, algorithm=theirs))  # it can be used again
    assert (
        whole.population.masks.shape == (8, 26) and whole.history[-1]["hypervolume"] > whole.history[0]["hypervolume"]
    )
    assert Limits(evaluator.space, {"macs": 0.6}).within(Limits(evaluator.space).counts(whole.population.masks)).all()
    with pytest.raises(Stopped):
        run(evaluator, tmp_path, algorithm=Pymoo(from_pymoo()), callback=stopping(3))
    again = PopulationEvaluator(net(), images()[0])
    assert_same(whole, run(again, tmp_path, algorithm=Pymoo(from_pymoo())))
    assert again.stats.asked < 8 * 4  # generations before the checkpoint are remembered
    with pytest.raises(CheckpointError, match=r"algorithm.options is"):
        run(evaluator, tmp_path, algorithm=Pymoo(from_pymoo(n_offsprings=4)))
    with pytest.raises(TypeError, match="algorithm must be a pymoo Algorithm, got str"):
        Pymoo("nsga2")


@needs_pymoo
def test_a_single_objective_of_pymoo(evaluator):
    from pymoo.algorithms.soo.nonconvex.ga import GA as Theirs

    like = from_pymoo()
    theirs = Theirs(
        pop_size=8,
        sampling=like.initialization.sampling,
        crossover=like.mating.crossover,
        mutation=like.mating.mutation,
    )
    result = run(evaluator, algorithm=Pymoo(theirs, objectives="score"), generations=8)
    assert result.history[-1]["best"] > result.history[0]["best"]


def test_without_pymoo(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo", None)
    monkeypatch.setitem(sys.modules, "pymoo.core", None)
    monkeypatch.setitem(sys.modules, "pymoo.core.algorithm", None)
    with pytest.raises(ImportError, match="needs the package pymoo: pip install pymoo"):
        Pymoo(object())


# --- several processes -------------------------------------------------------------------------------


RANKED = [("ecs", None), ("nsga2", None), ("nsga2", 25)]  # algorithm, images of a generation


def on_every_rank(folder):
    """Under torchrun's variables: a whole run, one that a rank stops, a fitness that is no number."""
    torch.set_num_threads(1)
    world = World.from_environment()
    torch.save(
        {(name, n): told(run(algorithm=name, fitness=rotating(n), world=world)) for name, n in RANKED},
        f"{folder}/{world.rank}.pt",
    )
    try:
        run(
            directory=f"{folder}/stopped",
            world=world,
            callback=lambda latest: stopping(2)(latest) if world.rank == world.size - 1 else None,
        )
    except Stopped as stop:
        (folder / f"stopped-{world.rank}.txt").write_text(str(stop))
    messages = []
    for broken in (lambda m: m.double().mean(1) / (m.sum(1) != 12), None):
        try:
            if broken is not None:
                run(fitness=broken, generations=30, world=world)
            else:
                run(seed=world.rank, world=world)
        except ValueError as error:
            messages.append(str(error))
    (folder / f"told-{world.rank}.json").write_text(json.dumps(messages))
    if world.size > 2:
        world.close()


def lose_a_rank(folder):
    world = World.from_environment()

    def callback(latest):
        if latest.generation == 3 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        run(directory=f"{folder}/lost", world=world, callback=callback)
    except RankLost as error:
        (folder / "lost.txt").write_text(str(error))
        os._exit(3)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """The folder that so many ranks wrote to; the second of two is lost in the end."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    from test_distributed import ended, ranks

    made = {}

    def start(size):
        if size not in made:
            folder = made[size] = tmp_path_factory.mktemp("ranks")
            code = "import pathlib\non_every_rank(pathlib.Path(sys.argv[1]))\n"
            code += "lose_a_rank(pathlib.Path(sys.argv[1]))\n" if size == 2 else ""
            results = ended(ranks(size, code, folder, module="test_evolve"))
            assert [status for status, _, _ in results] == ([3, -signal.SIGKILL] if size == 2 else [0] * size), results
        return made[size]

    return start


@pytest.mark.parametrize("size", [2, 3])  # 8 new individuals at most: 3 ranks have 2, 3 and 3 of them
def test_several_ranks_are_one_process(ranked, size):
    folder = ranked(size)
    for name, n in RANKED:
        parts, history = told(run(algorithm=name, fitness=rotating(n)))
        for rank in range(size):
            own, theirs = torch.load(folder / f"{rank}.pt")[name, n]
            assert theirs == history
            assert all(torch.equal(x, own[k]) if isinstance(x, torch.Tensor) else x == own[k] for k, x in parts.items())
    for rank in range(size):  # all stop with one, and one process goes on
        assert "stopped after generation 2" in (folder / f"stopped-{rank}.txt").read_text()
        nan, differ = json.loads((folder / f"told-{rank}.json").read_text())
        assert "12 of 26 genes) has no finite fitness: quality = inf" in nan
        assert "rank 1 differs from rank 0: seed is 0 on rank 0 and 1 on rank 1" in differ
    assert_same(run(directory=folder / "stopped"), run())


def test_a_lost_rank(ranked):
    folder = ranked(2)
    message = (folder / "lost.txt").read_text()
    assert "rank 0 of 2: another rank is gone" in message
    assert f"{folder / 'lost/checkpoint.safetensors'} is whole: the same command goes on from there" in message
    assert checkpoint.load(folder / "lost/checkpoint.safetensors")[1]["generation"] == 3
    assert_same(run(directory=folder / "lost"), run())


def test_the_function_of_the_package():
    import fastkd

    assert fastkd.evolve.evolve is evolve
