"""The benchmark of credit: its problems and measures against hand-worked values, and its quick run from end to end."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "paper"))
import identification as bench  # noqa: E402


@pytest.mark.parametrize("name", ["a: 3 agents", "a: 3, discrete", "b: 2 agents", "b: 3 agents", "c: 3 agents"])
def test_rewards_depend_on_their_parents_alone(name):
    """The truth that methods are held against: what is no parent of a reward can be anything."""
    problem = bench.draw(3, **bench.ROWS[name])
    paid = problem.pay(problem.x, problem.action)
    torch.testing.assert_close(problem.reward, paid.sum(1))
    agents, dims = problem.x.shape[1:]
    union = problem.edges.amax(0)  # [N, D]
    for i in range(agents):
        own, chosen = union[i].split([agents * dims, union.shape[1] - agents * dims])
        own, chosen = own.view(agents, dims), chosen.view(agents, -1)
        if name.startswith("c"):  # the next agent's state decides when, without being a parent itself
            own[(i + 1) % agents, :4] = 1
        x = torch.where(own > 0, problem.x, torch.randn_like(problem.x))
        action = torch.where(chosen > 0, problem.action, torch.rand_like(problem.action))
        torch.testing.assert_close(problem.pay(x, action)[:, i], paid[:, i])
        for parent in own.nonzero().tolist():
            moved = problem.x.clone()
            moved[:, parent[0], parent[1]] += 1
            assert (problem.pay(moved, problem.action)[:, i] - paid[:, i]).abs().mean() > 0.01


def test_edges_of_family_c_switch_with_the_next_agent():
    problem = bench.draw(1, family="c", agents=2)
    near = problem.state[:, 8:12].sum(1) > 0  # of agent 1, which switches agent 0's part
    counts = problem.edges[:, 0].sum(1)
    assert (counts[near] == 6).all() and (counts[~near] == 4).all()


def test_observations_side_by_side():
    """Family (e): agent by agent its own dimensions, and at the others' places theirs minus its own; the rewards and
    what they depend on are those of (a)."""
    problem, factored = (bench.draw(2, family=family, agents=3, dims=4) for family in "ea")
    torch.testing.assert_close(problem.reward, factored.reward, rtol=0, atol=0)
    x, seen = problem.x, problem.state.view(-1, 3, 3, 4)
    for i, j in itertools.product(range(3), range(3)):
        assert torch.equal(seen[:, i, j], x[:, i] if i == j else x[:, j] - x[:, i])
        at = slice((3 * i + j) * 4, (3 * i + j + 1) * 4)
        parents = factored.edges[:, :, 4 * i : 4 * i + 4] if i == j else torch.zeros(1, 3, 4)
        assert torch.equal(problem.edges[:, :, at], parents)
    assert torch.equal(problem.edges[:, :, 36:], factored.edges[:, :, 12:])


@pytest.mark.parametrize("name", ["b: 2 agents", "b: 3 agents", "c: 5 agents", "d: 3, product", "b: 10 agents"])
def test_caused(name):
    """The true Shapley value against its definition, one coalition, row and reference at a time. Two orders of ten
    agents say as much as all, because no part joins more than two: pair by pair it is the mean of both of theirs."""
    problem = bench.draw(1, **bench.ROWS[name])
    agents, rows = problem.x.shape[1], slice(bench.TRAIN, bench.TRAIN + 20)
    found = bench.caused(problem, rows)
    references = problem.x[: bench.REFERENCES], problem.action[: bench.REFERENCES]

    def value(t: int, members: tuple[int, ...]) -> torch.Tensor:
        x, action = (y.clone() for y in references)
        for i in members:
            x[:, i], action[:, i] = problem.x[t, i], problem.action[t, i]
        return problem.team(problem.pay(x, action)).mean()

    everyone = tuple(range(agents))
    for t, i in itertools.product(range(rows.start, rows.stop), range(0, agents, 4 if agents > 5 else 1)):
        if agents > 5:
            alone, without = value(t, (i,)) - value(t, ()), tuple(j for j in everyone if j != i)
            phi = (alone + value(t, everyone) - value(t, without)) / 2
        else:
            others = [j for j in everyone if j != i]
            phi = torch.zeros(())
            for size in range(agents):
                for members in itertools.combinations(others, size):
                    gain = value(t, (*members, i)) - value(t, members)
                    phi += gain / (agents * math.comb(agents - 1, size))
        torch.testing.assert_close(found[t - rows.start, i], phi, rtol=1e-4, atol=1e-4)


def test_measures():
    """F1 by hand; perfect credit has R^2 1, whatever constant is added, and a part that is missing costs its square."""
    found, truth = torch.tensor([1.0, 1, 1, 0, 0]), torch.tensor([1.0, 0, 0, 1, 0])
    assert bench.f1(found, truth) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    problem = bench.draw(1, family="b", agents=3)
    held = slice(bench.TRAIN, None)
    paid, cause, team = problem.pay(problem.x, problem.action)[held], bench.caused(problem, held), problem.reward[held]
    row = bench.measure(problem, cause, paid + torch.tensor([5.0, -7, 2]), team + 2 * team.std(), problem.edges)
    assert (row["r2_paid"], row["f1"], row["team_nmse"]) == pytest.approx((1, 1, 4), rel=1e-3)
    assert row["r2_cause"] < 0.95
    row = bench.measure(problem, cause, cause.clone(), team, None)
    assert row["r2_cause"] == pytest.approx(1) and row["r2_paid"] < 0.95 and "f1" not in row
    assert bench.r2(0.5 * paid, paid) == pytest.approx(0.75)


def test_quick_run():
    """`--quick` names the winner: our graph finds every edge, the word-for-word masks and the even split do not."""
    before = bench.PATH.read_bytes()
    done = subprocess.run(
        [sys.executable, str(ROOT / "paper" / "identification.py"), "--quick"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert bench.PATH.read_bytes() == before
    tables = {}
    for block in done.stdout.strip().split("\n\n"):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        tables[head[0]] = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    edges, paid, caused, _ = (tables[title] for title in bench.COLUMNS.values())
    for ours in ("shapley", "slots", "fixed"):
        assert float(paid["a: 3 agents"][ours]) >= 0.95 and float(caused["a: 3 agents"][ours]) >= 0.95
        assert float(edges["a: 3 agents"][ours]) >= 0.95
    for other in ("sigmoid masks", "one mask for all", "ridge", "even split"):
        assert float(paid["a: 3 agents"][other]) < 0.5
    assert float(edges["a: 3 agents"]["full"]) < 0.5
    for name in ("b: 3 agents", "c: 3 agents"):  # what is caused together is split by the Shapley value alone
        assert float(caused[name]["shapley"]) > float(caused[name]["slots"])
