"""The benchmark of credit: its problems and measures against hand-worked values, and its quick run from end to end."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "paper"))
import identification as bench  # noqa: E402


@pytest.mark.parametrize("name", ["a: 3 agents", "a: 3, discrete", "b: 3 agents", "c: 3 agents"])
def test_rewards_depend_on_their_parents_alone(name):
    """The truth that methods are held against: rows that agree in an agent's parents must agree in its reward.

    Looked at through a forest of 1-nearest neighbours: the closer two rows in the parents, the closer the rewards.
    """
    problem = bench.draw(3, **bench.ROWS[name])
    assert problem.rewards is not None
    torch.testing.assert_close(problem.team, problem.rewards.sum(1), rtol=1e-4, atol=1e-3)
    x = torch.cat([problem.state, problem.action.flatten(1)], 1)
    union = problem.edges.amax(0)  # [N, D]
    if name.startswith("c"):  # the next agent's state decides when, without being a parent itself
        for i in range(3):
            union[i, (i + 1) % 3 * 8 : (i + 1) % 3 * 8 + 4] = 1
    for i in range(3):
        parents = x[:, union[i] > 0]
        distance = torch.cdist(parents[:300], parents[300:])
        nearest = distance.argmin(1) + 300
        error = (problem.rewards[:300, i] - problem.rewards[nearest, i]).square().mean()
        others = (problem.rewards[:300, i - 1] - problem.rewards[nearest, i - 1]).square().mean()
        assert error / problem.rewards[:, i].var() < 0.6 * others / problem.rewards[:, i - 1].var()


def test_edges_of_family_c_switch_with_the_next_agent():
    problem = bench.draw(1, family="c", agents=2)
    near = problem.state[:, 8:12].sum(1) > 0  # of agent 1, which switches agent 0's part
    counts = problem.edges[:, 0].sum(1)
    assert (counts[near] == 6).all() and (counts[~near] == 4).all()


def test_measures():
    """F1 by hand; perfect credit has R^2 and skill 1, the even split skill 0, whatever constant is added."""
    found, truth = torch.tensor([1.0, 1, 1, 0, 0]), torch.tensor([1.0, 0, 0, 1, 0])
    assert bench.f1(found, truth) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    problem = bench.draw(1, family="a", agents=3)
    assert problem.rewards is not None
    rewards, team = problem.rewards[bench.TRAIN :], problem.team[bench.TRAIN :]
    perfect = bench.measure(problem, rewards + torch.tensor([5.0, -7, 2]), team, problem.edges)
    assert (perfect["r2"], perfect["skill"], perfect["f1"]) == pytest.approx((1, 1, 1), abs=1e-5)
    even = bench.measure(problem, team[:, None].expand(-1, 3) / 3, team + 2 * team.std(), None)
    assert even["skill"] == pytest.approx(0, abs=1e-6) and "f1" not in even
    assert even["team_nmse"] == pytest.approx(4, rel=1e-3)


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
    score, r2 = tables["edge F1"]["a: 3 agents"], tables["individual R²"]["a: 3 agents"]
    for graph in ("dynamic", "fixed"):
        assert float(score[graph]) >= 0.95 and float(r2[graph]) >= 0.95
    for other in ("full", "sigmoid masks", "one mask for all", "ridge", "even split"):
        assert float(r2[other]) < 0.5
    assert float(tables["individual R²"]["c: 3 agents"]["dynamic"]) > float(
        tables["individual R²"]["c: 3 agents"]["fixed"]
    )
