"""Does a causal model find who earned what? Made-up team rewards whose edges and individual rewards are known.

    python paper/identification.py             # what is missing of paper/results/identification.csv, then the tables
    python paper/identification.py --quick     # two minutes: a few rows, one draw, nothing written
    python paper/identification.py --show      # the tables only

Every agent earns r_i = f(own state dimensions) + g(own action), the team R = sum_i r_i, and only R is shown to the
methods. On top of that, four families: (a) nothing else; (b) a part that two neighbours share half and half, as the
cost of a collision; (c) a part of the agent's own dimensions that counts only while the next agent's state says so,
so its edges switch on and off; (d) R is the minimum, the product or an indicator of the r_i: no sum at all.
"""

import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import tyro
from rows import RESULTS, ROOT, add, fail, mean_std, print_table, read
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from causal_model import CausalModel

PATH = RESULTS / "identification.csv"
TRAIN, HELD_OUT = 54_000, 10_000

# name -> how the problem is drawn; what is not named is as in `draw`
ROWS: dict[str, dict[str, Any]] = {
    "a: 2 agents": {"family": "a", "agents": 2},
    "a: 3 agents": {"family": "a", "agents": 3},
    "a: 5 agents": {"family": "a", "agents": 5},
    "a: 10 agents": {"family": "a", "agents": 10},
    "a: 3, correlated": {"family": "a", "agents": 3, "correlated": True},
    "a: 3, kinked": {"family": "a", "agents": 3, "parts": "kinked"},
    "a: 3, sparse": {"family": "a", "agents": 3, "parts": "sparse"},
    "a: 3, spikes": {"family": "a", "agents": 3, "parts": "spikes"},
    "a: 3, half-kinked": {"family": "a", "agents": 3, "parts": "half-kinked", "correlated": True},
    "a: 3, noise": {"family": "a", "agents": 3, "noise": 0.2},
    "a: 3, 30 dimensions": {"family": "a", "agents": 3, "dims": 30},
    "a: 3, discrete": {"family": "a", "agents": 3, "discrete": True},
    "b: 2 agents": {"family": "b", "agents": 2},
    "b: 3 agents": {"family": "b", "agents": 3},
    "b: 5 agents": {"family": "b", "agents": 5},
    "b: 10 agents": {"family": "b", "agents": 10},
    "b: 3, half as large": {"family": "b", "agents": 3, "shared": 4.0},
    "c: 2 agents": {"family": "c", "agents": 2},
    "c: 3 agents": {"family": "c", "agents": 3},
    "c: 5 agents": {"family": "c", "agents": 5},
    "d: 3, minimum": {"family": "d", "agents": 3, "team": "minimum"},
    "d: 3, product": {"family": "d", "agents": 3, "team": "product"},
    "d: 3, indicator": {"family": "d", "agents": 3, "team": "indicator"},
}
# Ours (the two graphs) on every row, the others on those in COMPARED.
METHODS = ["dynamic", "fixed", "full", "sigmoid masks", "one mask for all", "ridge", "even split"]
COMPARED = ["a: 3 agents", "a: 5 agents", "a: 3, correlated", "b: 3 agents", "c: 3 agents", *list(ROWS)[-3:]]
QUICK = [("a: 3 agents", m) for m in METHODS] + [("b: 3 agents", "dynamic"), ("c: 3 agents", "dynamic")]
QUICK += [("c: 3 agents", "fixed"), ("d: 3, product", "dynamic")]


@dataclass
class Args:
    draws: int = 5
    """problems of each row, drawn from the seeds 1, 2, ..."""
    iterations: int = 2_000
    """gradient steps of each learned method, half as many again for family (c); learning rates fall linearly to 0"""
    batch_size: int = 512
    """samples of a step"""
    hidden_dim: int = 64
    """width of the reward predictors"""
    jobs: int = os.cpu_count() or 1
    """fits side by side, each on one thread"""
    quick: bool = False
    """a few rows with one draw, to see that it works; writes nothing"""
    show: bool = False
    """print what is there and fit nothing"""


@dataclass
class Problem:
    state: torch.Tensor  # [T, S]
    action: torch.Tensor  # [T, N, A]
    team: torch.Tensor  # [T]
    rewards: torch.Tensor | None  # [T, N], what each agent earned, without its noise; None where R is no sum
    edges: torch.Tensor  # [T or 1, N, S + N A], 1 where a dimension is a parent of an agent's reward


def draw(
    seed: int,
    family: str,
    agents: int,
    dims: int = 8,
    parts: str = "smooth",
    correlated: bool = False,
    noise: float = 0.0,
    discrete: bool = False,
    team: str = "sum",
    shared: float = 8.0,
) -> Problem:
    """A problem of TRAIN + HELD_OUT samples: parents and weights at random, three own state dimensions and an action.

    `correlated`: half of every state dimension's variance comes from common factors, and actions follow the state.
    `shared`: the largest cost of two neighbours in family (b).
    `noise`: deviation of the noise in each reward, as a share of the reward's own.
    """
    g = torch.Generator().manual_seed(seed)
    samples, num_actions = TRAIN + HELD_OUT, 5 if discrete else 2
    x = torch.randn(samples, agents, dims, generator=g)
    if correlated:
        loading = torch.randn(agents * dims, agents * dims // 2, generator=g)
        factors = torch.randn(samples, loading.shape[1], generator=g) @ (loading / loading.norm(dim=1, keepdim=True)).T
        x = math.sqrt(0.5) * (x + factors.view_as(x))
    if discrete:
        chosen = torch.randint(num_actions, (samples, agents), generator=g)
        action = nn.functional.one_hot(chosen, num_actions).float()
    elif correlated:
        action = torch.tanh(0.5 * x[..., :2] + 0.7 * torch.randn(samples, agents, 2, generator=g))
    else:
        action = 2 * torch.rand(samples, agents, 2, generator=g) - 1

    rewards = torch.zeros(samples, agents)
    edges = torch.zeros(1, agents, agents * dims + agents * num_actions)
    if family == "c":
        edges = edges.expand(samples, -1, -1).clone()
    order = torch.stack([torch.randperm(dims, generator=g) for _ in range(agents)])  # [N, dims]: 0 to 2 are parents
    for i in range(agents):
        a, b, c = (x[:, i, d] for d in order[i, :3])
        weight = 0.7 + 0.8 * torch.rand((), generator=g)
        if discrete:
            effect = 4 * torch.rand(num_actions, generator=g) - 2
            moved, used = action[:, i] @ effect, range(num_actions)
        else:
            d = int(torch.randint(2, (), generator=g))
            u, used = math.sqrt(3) * action[:, i, d], [d]
            bump, step = 2.5 * torch.exp(-3 * u**2), 2 * (u > 1).float()
            shapes = {"smooth": u**2, "kinked": 1.5 * u.abs(), "sparse": bump, "spikes": step}
            moved = weight * (shapes | {"half-kinked": 1.5 * u.clamp(min=0)})[parts]
        if parts == "smooth":
            rewards[:, i] = torch.sin(1.5 * a) + b * c + moved
        elif parts == "kinked":
            rewards[:, i] = 1.5 * a.abs() + torch.maximum(b, c) + moved
        elif parts == "half-kinked":
            rewards[:, i] = a.abs() + torch.maximum(b, c) + moved
        elif parts == "spikes":  # steps that are rarely up, and a peak
            rewards[:, i] = 2 * ((a.abs() < 0.5) & (b > 0)) + 1 / (c.abs() + 0.3) + moved
        else:  # smooth bumps
            rewards[:, i] = 3 * torch.exp(-3 * a**2) + 4 * torch.exp(-1.5 * (b**2 + c**2)) + moved
        edges[:, i, i * dims + order[i, :3]] = 1
        edges[:, i, [agents * dims + i * num_actions + d for d in used]] = 1
    if family == "b":
        for i in range(agents if agents > 2 else 1):
            pair = (i, (i + 1) % agents)
            mine, theirs = order[pair[0], 3:5], order[pair[1], 5:7]
            gap = x[:, pair[0], mine] - x[:, pair[1], theirs]
            cost = shared * torch.exp(-gap.square().sum(1) / 2)
            for j in pair:
                rewards[:, j] -= cost / 2
                edges[:, j, pair[0] * dims + mine] = 1
                edges[:, j, pair[1] * dims + theirs] = 1
    if family == "c":
        for i in range(agents):
            near = (x[:, (i + 1) % agents, :4].sum(1) > 0).float()
            a, b = (x[:, i, d] for d in order[i, 3:5])
            rewards[:, i] += near * (2 * torch.sin(1.5 * a) + 1.5 * b**2)
            edges[:, i, i * dims + order[i, 3:5]] = near[:, None]
    noisy = rewards + noise * rewards.std(0) * torch.randn(samples, agents, generator=g)
    if family == "d":
        centred = rewards - rewards.mean(0)
        total = {"minimum": centred.min(1).values, "product": centred.prod(1), "indicator": (centred > -0.5).all(1)}
        return Problem(x.flatten(1), action, total[team].float(), None, edges)
    return Problem(x.flatten(1), action, noisy.sum(1), rewards, edges)


class Masked(nn.Module):
    """The two published ways to mask: sigmoids of a network (Eq. 3 to 6 word for word), or one vector for all agents.

    The second is what the authors' code does: freely learned numbers that start from a unit normal, a mean in place of
    the L1 sum, no clipping in the credit, four hidden layers of 64, Adam with epsilon and weight decay 1e-5.
    """

    def __init__(self, agents: int, parents: int, hidden: int, shared: bool):
        super().__init__()
        self.shared = shared
        sizes = [parents + agents, 64, 64, 64, 64] if shared else [parents + agents, hidden, hidden, hidden]
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        self.predictor = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
        self.mask = nn.Parameter(torch.randn(parents))
        self.mask_network = nn.Sequential(nn.Linear(parents + agents, 64), nn.ReLU(), nn.Linear(64, parents))
        self.identity = torch.eye(agents)

    def groups(self) -> list[dict]:
        if self.shared:
            slow = {"eps": 1e-5, "weight_decay": 1e-5}
            return [{"params": self.predictor.parameters(), "lr": 5e-2, **slow}, {"params": [self.mask], "lr": 5e-4}]
        return [{"params": [*self.predictor.parameters(), *self.mask_network.parameters()], "lr": 1e-3}]

    def forward(self, x: torch.Tensor, clip: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, D] -> individual rewards [B, N] and masks [B or 1, N, D]."""
        identity, x = self.identity.expand(len(x), -1, -1), x[:, None].expand(-1, len(self.identity), -1)
        masks = self.mask.expand(1, len(self.identity), -1)
        if not self.shared:
            masks = torch.sigmoid(self.mask_network(torch.cat([x, identity], 2)))
            masks = (masks >= 0.1).float() if clip else masks
        return self.predictor(torch.cat([x * masks, identity], 2)).squeeze(2), masks


def train(groups: list[dict], loss, args: Args) -> None:
    """Adam on loss(rows), learning rates falling linearly to 0."""
    optimizer = torch.optim.Adam(groups, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    for iteration in range(args.iterations):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - iteration / args.iterations)
        value = loss(torch.randint(TRAIN, (args.batch_size,)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def fit(problem: Problem, method: str, args: Args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Credit [HELD_OUT, N], predicted team reward [HELD_OUT] and edges [HELD_OUT or 1, N, D] of a method."""
    state, action, team = problem.state, problem.action, problem.team
    agents, held = action.shape[1], slice(TRAIN, None)
    mean, std = team[:TRAIN].mean(), team[:TRAIN].std()
    parents = torch.cat([state, action.flatten(1)], dim=1)  # unit scale by construction
    if method == "even split":
        return team[held, None].expand(-1, agents) / agents, torch.full_like(team[held], torch.nan), None
    if method == "ridge":
        # Appendix D: r_i = W phi(s, a, i), the sum over i fitted in closed form; phi: 1,000 random Fourier features.
        frequency = torch.randn(parents.shape[1] + agents, 1000) / 3
        phase = 2 * math.pi * torch.rand(1000)
        identity = 3 * torch.eye(agents)

        def features(rows: slice, i: int) -> torch.Tensor:
            x = torch.cat([parents[rows], identity[i].expand(len(parents[rows]), -1)], 1)
            return torch.cos(x @ frequency + phase)

        phi = torch.stack([features(slice(0, TRAIN), i) for i in range(agents)]).sum(0)
        weights = torch.linalg.solve(
            phi.T @ phi + 10 * torch.eye(1000), phi.T @ ((team[:TRAIN] - mean) / std)
        )  # Eq. 16
        credit = torch.stack([features(held, i) @ weights for i in range(agents)], 1) * std + mean / agents
        return credit, credit.sum(1), None
    if method in ("sigmoid masks", "one mask for all"):
        model = Masked(agents, parents.shape[1], args.hidden_dim, shared=method == "one mask for all")

        def masked_loss(rows: torch.Tensor) -> torch.Tensor:
            prediction, masks = model(parents[rows], clip=False)
            error = (prediction.sum(1) - (team[rows] - mean) / std).square().mean()
            size = masks.abs().mean() if model.shared else masks.abs().sum((1, 2)).mean()
            return error + 7e-3 * size

        train(model.groups(), masked_loss, args)
        with torch.no_grad():
            credit, masks = model(parents[held], clip=True)
        credit = credit * std + mean / agents
        return credit, credit.sum(1), (masks.abs() >= 0.1).float()
    owner = [agent for agent in range(agents) for _ in range(state.shape[1] // agents)]
    graph: Any = method
    ours = CausalModel(agents, state.shape[1], action.shape[2], graph, owner, hidden_dim=args.hidden_dim)
    ours.fit_statistics(state[:TRAIN], team[:TRAIN])
    train(ours.parameter_groups(), lambda rows: ours.loss(state[rows], action[rows], team[rows])[0], args)
    edges = torch.cat(ours.masks(state[held], action[held]), dim=2)
    predicted = ours.assign(state[held], action[held]).sum(1)
    return ours.assign(state[held], action[held], team[held]), predicted, edges


def f1(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Harmonic mean of precision and recall of 0/1 tensors of one shape."""
    return float(2 * (found * truth).sum() / (found.sum() + truth.sum()).clamp(min=1e-9))


def measure(problem: Problem, credit: torch.Tensor, predicted: torch.Tensor, edges: torch.Tensor | None) -> dict:
    """Everything on held-out samples. Constants are no part of R^2: any split of them adds up."""
    team = problem.team[TRAIN:]
    row = {"team_nmse": float((predicted - team).square().mean() / team.var())}
    if problem.rewards is not None:
        truth = problem.rewards[TRAIN:]
        credit, truth, even = (y - y.mean(0) for y in (credit, truth, team[:, None] / truth.shape[1]))
        row["r2"] = float((1 - (credit - truth).square().mean(0) / truth.square().mean(0)).mean())
        row["skill"] = float(1 - (credit - truth).square().mean() / (even - truth).square().mean())
        if edges is not None:
            true = problem.edges[TRAIN:] if len(problem.edges) > 1 else problem.edges
            pair = [by_dimension(e.expand(HELD_OUT, -1, -1), problem) for e in (edges, true)]
            row["f1"] = f1(*pair)
            row["pooled_f1"] = f1(*(e.amax(1) for e in pair))  # a parent of anybody's reward, whosoever it is
    return row


def by_dimension(edges: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Edges [B, N, D] with a one-hot action's columns taken together: one variable, one of its columns redundant."""
    agents, choices = problem.action.shape[1:]
    if choices == 2:
        return edges
    state, action = edges.split([problem.state.shape[1], agents * choices], dim=2)
    return torch.cat([state, action.unflatten(2, (agents, choices)).amax(3)], dim=2)


def job(key: tuple[str, str, int], args: Args) -> dict[str, str]:
    """The row of a problem, a method and a draw."""
    name, method, seed = key
    torch.set_num_threads(1)
    if ROWS[name]["family"] == "c":
        args = dataclasses.replace(args, iterations=args.iterations * 3 // 2)
    problem = draw(seed, **ROWS[name])
    torch.manual_seed(seed)
    started = time.monotonic()
    measured = measure(problem, *fit(problem, method, args))
    row = {"row": name, "method": method, "draw": str(seed), "iterations": str(args.iterations)}
    row |= {"batch_size": str(args.batch_size), "hidden_dim": str(args.hidden_dim)}
    row |= {name: f"{measured[name]:.4f}" if math.isfinite(measured.get(name, math.nan)) else "" for name in COLUMNS}
    return {**row, "seconds": f"{time.monotonic() - started:.1f}"}


COLUMNS = {"f1": "edge F1", "pooled_f1": "pooled F1", "r2": "individual R²", "skill": "skill", "team_nmse": "team NMSE"}


def show(rows: list[dict[str, str]]) -> None:
    """A Markdown table for each measure: problems down, methods across, mean ± standard deviation over the draws."""
    for column, title in COLUMNS.items():
        found: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            if row[column]:
                found.setdefault((row["row"], row["method"]), []).append(float(row[column]))
        methods = [method for method in METHODS if any(key[1] == method for key in found)]
        problems = [name for name in ROWS if any(key[0] == name for key in found)]
        print()
        cells = [[name, *(mean_std(found.get((name, method), []), 3) for method in methods)] for name in problems]
        print_table([title, *methods], cells)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for name, value in vars(args).items():
        if value < 1 and type(value) is int:
            fail(f"--{name.replace('_', '-')} is {value}, expected a number from 1")
        if name in ("iterations", "batch_size", "hidden_dim") and value != getattr(Args, name) and not args.quick:
            fail(f"{PATH.name} holds rows with the default --{name.replace('_', '-')}; give --quick beside another one")
    rows = [] if args.quick else read(PATH)
    there = {(row["row"], row["method"], int(row["draw"])) for row in rows}
    wanted = [(n, m, s) for s in range(1, args.draws + 1) for n in ROWS for m in METHODS]
    wanted = [key for key in wanted if key[1] in METHODS[:2] or key[0] in COMPARED]
    wanted.sort(key=lambda key: (ROWS[key[0]]["agents"] == 10, key[1] not in METHODS[:2]))  # the slowest last
    if args.quick:
        args.iterations, wanted = min(args.iterations, 1000), [(n, m, 1) for n, m in QUICK]
    todo = [] if args.show else [key for key in wanted if key not in there]
    if todo:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that leaving `with` ends the processes
        with multiprocessing.Pool(args.jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                fits = pool.imap_unordered(functools.partial(job, args=args), todo)
                for row in tqdm(fits, total=len(todo), unit="fit", smoothing=0):
                    rows.append(row)
                    if not args.quick:
                        add(PATH, row)
            except KeyboardInterrupt:
                print(f"identification.py: stopped; the rows so far are in {PATH}", file=sys.stderr)
                raise SystemExit(130) from None
    show(rows)
