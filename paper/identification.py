"""Does a causal model find who earned what? Made-up team rewards whose edges and individual rewards are known.

    python paper/identification.py             # what is missing of paper/results/identification.csv, then the tables
    python paper/identification.py --quick     # two minutes: a few rows, one draw, nothing written
    python paper/identification.py --show      # the tables only

Every agent earns r_i = f(own state dimensions) + g(own action), the team R = sum_i r_i, and only R is shown to the
methods. Five families: (a) nothing else; (b) a part that two neighbours share half and half, as the cost of a
collision; (c) a part of the agent's own dimensions that counts only while the next agent's state says so, so its edges
switch on and off; (d) R is the minimum, the product or an indicator of the r_i: no sum at all; (e) is (a), but recorded
is what every agent observes: its own dimensions, and those of the others relative to them.

A credit is held against what every agent was paid, r_i, and against what it caused: its Shapley value in the true R.
"""

import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rows import RESULTS, ROOT, add, fail, mean_std, print_table, read
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from causal_model import CausalModel

PATH = RESULTS / "identification.csv"
TRAIN, HELD_OUT, REFERENCES = 54_000, 2_000, 64
STEPS, BATCH, HIDDEN, RATE = 2_000, 512, 64, 1e-3  # half as many steps again for (b) and (c)

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
    "e: 3 agents": {"family": "e", "agents": 3, "dims": 4},
    "e: 3 agents, factored": {"family": "a", "agents": 3, "dims": 4},
    "e: 5 agents": {"family": "e", "agents": 5, "dims": 4},
    "e: 5 agents, factored": {"family": "a", "agents": 5, "dims": 4},
}
# "slots" is Eq. 6, from the model that "shapley" fits. The last five only on the rows in COMPARED.
METHODS = ["cause vs paid", "shapley", "slots", "fixed"]
METHODS += ["full", "sigmoid masks", "one mask for all", "ridge", "even split"]
COMPARED = ["a: 3 agents", "a: 5 agents", "a: 3, correlated", "b: 3 agents", "c: 3 agents"]
COMPARED += [name for name in ROWS if name[0] == "d"]
QUICK = [("a: 3 agents", m) for m in METHODS if m != "slots"] + [("b: 3 agents", "shapley"), ("c: 3 agents", "shapley")]
# what an agent's dimensions a, b, c and its action u are worth
PARTS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "smooth": (lambda a, b, c: torch.sin(1.5 * a) + b * c, lambda u: u**2),
    "kinked": (lambda a, b, c: 1.5 * a.abs() + torch.maximum(b, c), lambda u: 1.5 * u.abs()),
    "half-kinked": (lambda a, b, c: a.abs() + torch.maximum(b, c), lambda u: 1.5 * u.clamp(min=0)),
    "sparse": (
        lambda a, b, c: 3 * torch.exp(-3 * a**2) + 4 * torch.exp(-1.5 * (b**2 + c**2)),
        lambda u: 2.5 * torch.exp(-3 * u**2),
    ),
    "spikes": (lambda a, b, c: 2 * ((a.abs() < 0.5) & (b > 0)) + 1 / (c.abs() + 0.3), lambda u: 2 * (u > 1).float()),
}
TEAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda r: r.sum(-1),
    "minimum": lambda r: r.min(-1).values,
    "product": lambda r: r.prod(-1),
    "indicator": lambda r: (r > -0.5).all(-1).float(),
}


@dataclass
class Args:
    draws: int = 3
    """problems of each row, drawn from the seeds 1, 2, ..."""
    jobs: int = os.cpu_count() or 1
    """fits side by side, each on one thread"""
    quick: bool = False
    """a few rows with one draw, to see that it works; writes nothing"""
    show: bool = False
    """print what is there and fit nothing"""


@dataclass
class Problem:
    x: Tensor  # [T, N, dims], the agents' own state dimensions
    action: Tensor  # [T, N, A]
    pay: Callable[[Tensor, Tensor], Tensor]  # of x and action: rewards without noise [..., N], zero on average
    team: Callable[[Tensor], Tensor]  # of rewards [..., N]: the team reward [...]
    reward: Tensor  # [T], the team reward with its noise
    state: Tensor  # [T, S], what is recorded of x, agent by agent
    edges: Tensor  # [T or 1, N, S + N * A], 1 where a dimension is a parent of an agent's reward


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

    order = torch.stack([torch.randperm(dims, generator=g) for _ in range(agents)])  # [N, dims]: 0 to 2 are parents
    weight = 0.7 + 0.8 * torch.rand(agents, generator=g)
    if discrete:
        effect = 4 * torch.rand(agents, num_actions, generator=g) - 2
    else:
        effect = math.sqrt(3) * nn.functional.one_hot(torch.randint(2, (agents,), generator=g), 2)
    centre = torch.zeros(agents)

    def pay(x: Tensor, action: Tensor) -> Tensor:
        own = x.gather(-1, order.expand(x.shape))
        following = x.roll(-1, -2)  # the next agent's
        u = (action * effect).sum(-1)
        rewards = PARTS[parts][0](*own[..., :3].unbind(-1)) + (u if discrete else weight * PARTS[parts][1](u))
        if family == "b":
            gap = own[..., 3:5] - own.roll(-1, -2)[..., 5:7]
            cost = shared * torch.exp(-gap.square().sum(-1) / 2)
            cost[..., 1:] *= agents > 2  # two agents are one pair, not two
            rewards = rewards - (cost + cost.roll(1, -1)) / 2
        if family == "c":
            near = following[..., :4].sum(-1) > 0
            rewards = rewards + near * (2 * torch.sin(1.5 * own[..., 3]) + 1.5 * own[..., 4] ** 2)
        return rewards - centre

    paid = pay(x, action)
    centre += paid.mean(0)
    reward = TEAMS[team](paid - centre + noise * paid.std(0) * torch.randn(samples, agents, generator=g))

    state, width = x, dims  # width: from one agent's own dimensions to the next agent's
    if family == "e":  # [T, observer, observed, dims]
        itself = torch.eye(agents, dtype=torch.bool)[..., None]
        state, width = torch.where(itself, x[:, None], x[:, None] - x[:, :, None]), dims * (agents + 1)
    state = state.flatten(1)
    column = width * torch.arange(agents)[:, None] + order
    edges = torch.zeros(samples if family == "c" else 1, agents, state.shape[1] + agents * num_actions)
    for i in range(agents):
        edges[:, i, column[i, :3]] = 1
        edges[:, i, state.shape[1] + i * num_actions :][:, :num_actions] = (effect[i] != 0).float()
        following = (i + 1) % agents
        if family == "b" and (i == 0 or agents > 2):
            for j in (i, following):
                edges[:, j, torch.cat([column[i, 3:5], column[following, 5:7]])] = 1
        if family == "c":
            edges[:, i, column[i, 3:5]] = (x[:, following, :4].sum(1) > 0).float()[:, None]
    return Problem(x, action, pay, TEAMS[team], reward, state, edges)


def caused(problem: Problem, rows: slice) -> Tensor:
    """The agents' Shapley values [T, N] in the game v(S) = mean over REFERENCES rows of the true team reward without
    noise, with the state dimensions and actions of the agents in S from the row, those of the others from a reference.
    """
    (x, action), agents = ((y[rows, None], y[:REFERENCES]) for y in (problem.x, problem.action)), problem.x.shape[1]

    @functools.cache
    def value(members: frozenset[int]) -> Tensor:
        inside = torch.tensor([i in members for i in range(agents)])[:, None]
        return problem.team(problem.pay(torch.where(inside, *x), torch.where(inside, *action))).mean(1)

    # One order and its reverse are enough where no part depends on more than two agents, as in all but family (d).
    orders: list[Sequence[int]] = [range(agents), range(agents)[::-1]]
    orders = orders if agents > 5 else [*itertools.permutations(range(agents))]
    phi = torch.zeros(len(x[0]), agents)
    for order in orders:
        for size, agent in enumerate(order):
            phi[:, agent] += value(frozenset(order[: size + 1])) - value(frozenset(order[:size]))
    return phi / len(orders)


class Masked(nn.Module):
    """The two published ways to mask: sigmoids of a network (Eq. 3 to 6 word for word), or one vector for all agents.

    The second is what the authors' code does: freely learned numbers that start from a unit normal, a mean in place of
    the L1 sum, no clipping in the credit, four hidden layers of 64, Adam with epsilon and weight decay 1e-5.
    """

    def __init__(self, agents: int, parents: int, shared: bool):
        super().__init__()
        self.shared = shared
        sizes = [parents + agents] + (4 * [64] if shared else 3 * [HIDDEN])
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        self.predictor = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
        self.mask = nn.Parameter(torch.randn(parents))
        self.mask_network = nn.Sequential(nn.Linear(parents + agents, 64), nn.ReLU(), nn.Linear(64, parents))
        self.identity = torch.eye(agents)

    def groups(self) -> list[dict]:
        if self.shared:
            slow = {"eps": 1e-5, "weight_decay": 1e-5}
            return [{"params": self.predictor.parameters(), "lr": 5e-2, **slow}, {"params": [self.mask], "lr": 5e-4}]
        return [{"params": [*self.predictor.parameters(), *self.mask_network.parameters()], "lr": RATE}]

    def forward(self, x: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
        """[B, D] -> individual rewards [B, N] and masks [B or 1, N, D]."""
        identity, x = self.identity.expand(len(x), -1, -1), x[:, None].expand(-1, len(self.identity), -1)
        masks = self.mask.expand(1, len(self.identity), -1)
        if not self.shared:
            masks = torch.sigmoid(self.mask_network(torch.cat([x, identity], 2)))
            masks = (masks >= 0.1).float() if clip else masks
        return self.predictor(torch.cat([x * masks, identity], 2)).squeeze(2), masks


def train(groups: list[dict], loss, steps: int, project=lambda: None) -> None:
    """Adam on loss(rows), learning rates falling linearly to 0, `project` after each step."""
    optimizer = torch.optim.Adam(groups, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        value = loss(torch.randint(TRAIN, (BATCH,)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        project()


def fit(
    problem: Problem, method: str, steps: int, cause: Tensor
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Credit [HELD_OUT, N] by method, predicted team reward [HELD_OUT] and edges [HELD_OUT or 1, N, D]."""
    state, action, team = problem.state, problem.action, problem.reward
    agents, held = action.shape[1], slice(TRAIN, None)
    mean, std = team[:TRAIN].mean(), team[:TRAIN].std()
    parents = torch.cat([state, action.flatten(1)], dim=1)  # unit scale by construction
    if method in ("even split", "cause vs paid"):
        even = team[held, None].expand(-1, agents) / agents
        return {method: even if method == "even split" else cause}, None, None
    if method == "ridge":
        # Appendix D: r_i = W phi(s, a, i), the sum over i fitted in closed form; phi: 1,000 random Fourier features.
        frequency = torch.randn(parents.shape[1] + agents, 1000) / 3
        phase = 2 * math.pi * torch.rand(1000)
        identity = 3 * torch.eye(agents)

        def features(rows: slice, i: int) -> Tensor:
            x = torch.cat([parents[rows], identity[i].expand(len(parents[rows]), -1)], 1)
            return torch.cos(x @ frequency + phase)

        phi = torch.stack([features(slice(0, TRAIN), i) for i in range(agents)]).sum(0)
        gram = phi.T @ phi + 10 * torch.eye(1000)
        weights = torch.linalg.solve(gram, phi.T @ ((team[:TRAIN] - mean) / std))  # Eq. 16
        credit = torch.stack([features(held, i) @ weights for i in range(agents)], 1) * std + mean / agents
        return {method: credit}, credit.sum(1), None
    if method in ("sigmoid masks", "one mask for all"):
        model = Masked(agents, parents.shape[1], shared=method == "one mask for all")

        def masked_loss(rows: Tensor) -> Tensor:
            prediction, masks = model(parents[rows], clip=False)
            error = (prediction.sum(1) - (team[rows] - mean) / std).square().mean()
            size = masks.abs().mean() if model.shared else masks.abs().sum((1, 2)).mean()
            return error + 7e-3 * size

        train(model.groups(), masked_loss, steps)
        with torch.no_grad():
            credit, masks = model(parents[held], clip=True)
        credit = credit * std + mean / agents
        return {method: credit}, credit.sum(1), (masks.abs() >= 0.1).float()
    owner = [agent for agent in range(agents) for _ in range(state.shape[1] // agents)]
    graph: Any = "dynamic" if method == "shapley" else method
    sizes = agents, state.shape[1], action.shape[2]
    ours = CausalModel(*sizes, owner, graph=graph, references=32, hidden_dim=HIDDEN)
    ours.fit_statistics(state[:TRAIN], action[:TRAIN], team[:TRAIN])

    def loss(rows: Tensor) -> Tensor:
        return ours.loss(state[rows], action[rows], team[rows])[0]

    train(ours.parameter_groups(RATE), loss, steps, ours.project)
    sample = state[held], action[held]
    credit = {method: ours.assign(*sample, team[held])}
    if method == "shapley":
        ours.share = "slots"
        credit["slots"] = ours.assign(*sample, team[held])
    return credit, ours.predict(*sample), (torch.cat(ours.probabilities(*sample), dim=2) >= ours.h).float()


def f1(found: Tensor, truth: Tensor) -> float:
    """Harmonic mean of precision and recall of 0/1 tensors of one shape."""
    return float(2 * (found * truth).sum() / (found.sum() + truth.sum()).clamp(min=1e-9))


def r2(credit: Tensor, truth: Tensor) -> float:
    """R^2, mean over agents. Constants are no part of it: any split of them adds up."""
    credit, truth = credit - credit.mean(0), truth - truth.mean(0)
    return float((1 - (credit - truth).square().mean(0) / truth.square().mean(0)).mean())


def measure(problem: Problem, cause: Tensor, credit: Tensor, predicted: Tensor | None, edges: Tensor | None) -> dict:
    """Everything on held-out samples. Where the team reward is no sum, nobody was paid."""
    held, row = slice(TRAIN, None), {}
    if predicted is not None:
        row["team_nmse"] = float((predicted - problem.reward[held]).square().mean() / problem.reward[held].var())
    if credit is not cause:
        row["r2_cause"] = r2(credit, cause)
    if problem.team is TEAMS["sum"]:
        row["r2_paid"] = r2(credit, problem.pay(problem.x[held], problem.action[held]))
        if edges is not None:
            true = problem.edges[held] if len(problem.edges) > 1 else problem.edges
            row["f1"] = f1(*(by_dimension(e.expand(HELD_OUT, -1, -1), problem) for e in (edges, true)))
    return row


def by_dimension(edges: Tensor, problem: Problem) -> Tensor:
    """Edges [B, N, D] with a one-hot action's columns taken together: one variable, one of its columns redundant."""
    agents, choices = problem.action.shape[1:]
    if choices == 2:
        return edges
    state, action = edges.split([problem.state.shape[1], agents * choices], dim=2)
    return torch.cat([state, action.unflatten(2, (agents, choices)).amax(3)], dim=2)


def job(key: tuple[str, str, int], steps: int) -> list[dict[str, str]]:
    """The rows of a problem, a method and a draw: two where one fit is measured twice."""
    name, fitted, seed = key
    torch.set_num_threads(1)
    steps = steps * 3 // 2 if name[0] in "bc" else steps
    problem = draw(seed, **ROWS[name])
    cause = caused(problem, slice(TRAIN, None))
    torch.manual_seed(seed)
    started = time.monotonic()
    credits, predicted, edges = fit(problem, fitted, steps, cause)
    seconds, rows = f"{time.monotonic() - started:.1f}", []
    for method, credit in credits.items():
        measured = measure(problem, cause, credit, predicted, edges)
        scores = {column: f"{measured[column]:.4f}" if column in measured else "" for column in COLUMNS}
        rows.append({"row": name, "method": method, "draw": str(seed), "steps": str(steps)} | scores)
        rows[-1]["seconds"] = seconds
    return rows


COLUMNS = {"f1": "edge F1", "r2_paid": "R² with paid", "r2_cause": "R² with caused", "team_nmse": "team NMSE"}


def show(rows: list[dict[str, str]]) -> None:
    """A Markdown table for each measure: problems down, methods across, mean ± standard deviation over the draws."""
    for column, title in COLUMNS.items():
        found: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            if row[column]:
                found.setdefault((row["row"], row["method"]), []).append(float(row[column]))
        methods, cells = [method for method in METHODS if any(key[1] == method for key in found)], []
        for name in ROWS:
            values = [found.get((name, method), []) for method in methods]
            draws = "/".join(str(n) for n in sorted({len(x) for x in values if x}))
            cells += [[name, draws, *(mean_std(x, 3) for x in values)]] if draws else []
        print()
        print_table([title, "draws", *methods], cells)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for name in ("draws", "jobs"):
        if getattr(args, name) < 1:
            fail(f"--{name} is {getattr(args, name)}, expected a number from 1")
    rows = [] if args.quick else read(PATH)
    there = {(row["row"], row["method"], int(row["draw"])) for row in rows}
    wanted = [(n, m, s) for s in range(1, args.draws + 1) for n in ROWS for m in METHODS if m != "slots"]
    wanted = [key for key in wanted if key[1] in METHODS[:4] or key[0] in COMPARED]
    wanted.sort(key=lambda key: (METHODS.index(key[1]) // 3, ROWS[key[0]]["agents"] == 10))  # the slowest last
    wanted = [(n, m, 1) for n, m in QUICK] if args.quick else wanted
    todo = [] if args.show else [key for key in wanted if key not in there]
    if todo:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that leaving `with` ends the processes
        with multiprocessing.Pool(args.jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                fits = pool.imap_unordered(functools.partial(job, steps=STEPS // 2 if args.quick else STEPS), todo)
                for row in itertools.chain.from_iterable(tqdm(fits, total=len(todo), unit="fit", smoothing=0)):
                    rows.append(row)
                    if not args.quick:
                        add(PATH, row)
            except KeyboardInterrupt:
                print(f"identification.py: stopped; the rows so far are in {PATH}", file=sys.stderr)
                raise SystemExit(130) from None
    show(rows)
