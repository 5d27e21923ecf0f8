"""SHAQ, SHAQ-CQL and SQDDPG: their equations against known answers, a matrix game, and short trainings."""

import copy
import csv
import hashlib
import json
import sys
import time
import types

import pytest
import torch
import toy
from torch import nn

sys.path.insert(0, str(toy.ROOT / "paper"))
import runs
import shaq
import sqddpg

import macca_icq

B, N, A = 6, 3, 5


@pytest.fixture(autouse=True)
def name_in_errors(monkeypatch):
    """A run puts its name into the errors of macca_icq: for a test only."""
    monkeypatch.setattr(macca_icq, "__file__", macca_icq.__file__)


def make_batch(discrete=True, n=N):
    """Random rows without a death or an end; the last action is forbidden to all."""
    yes = torch.ones(B, n, dtype=torch.bool)
    batch = {
        "observations": torch.randn(B, n, 4),
        "next_observations": torch.randn(B, n, 4),
        "states": torch.randn(B, 7),
        "next_states": torch.randn(B, 7),
        "has_next_state": yes[:, 0],
        "rewards": torch.randn(B),
        "terminals": ~yes[:, 0],
        "timeouts": ~yes[:, 0],
        "alive": yes,
        "next_alive": yes,
        "actions": torch.randint(A - 1, (B, n)) if discrete else torch.rand(B, n, A) * 2 - 1,
    }
    masks = (torch.arange(A) < A - 1).expand(B, n, A)
    return batch | ({"action_masks": masks, "next_action_masks": masks} if discrete else {})


class Table(nn.Module):
    """Q-values that are parameters [N, B, A], whatever is observed."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x):
        return self.values


def tabular(batch, args):
    """Networks of SHAQ with free Q-values."""
    nets, n = shaq.Networks(batch, args), batch["alive"].shape[1]
    nets.q, nets.q_target = Table(torch.randn(n, B, A)), Table(torch.randn(n, B, A))
    return nets


def loss_and_gradient(batch, nets, args):
    """SHAQ's loss and its gradient in all parameters of Q; equal random orders in every call."""
    torch.manual_seed(0)
    loss = shaq.shaq_loss(batch, nets, args)[0]
    return loss, torch.autograd.grad(loss, list(nets.q.parameters()))


# ---- orders of the agents ----
def test_coalitions_have_the_shapley_values_probabilities():
    earlier = shaq.before(torch.ones(1, 3), 10)  # all 6 orders
    found = {}
    for order in earlier[0, :, 0].tolist():  # who is before agent 0
        found[tuple(order)] = found.get(tuple(order), 0) + 1 / 6
    expected = {(False,) * 3: 1 / 3, (False, True, False): 1 / 6, (False, False, True): 1 / 6}
    assert found == pytest.approx(expected | {(False, True, True): 1 / 3})

    sampled = shaq.before(torch.ones(4000, 4), 10)  # 10 of 24 orders
    assert sampled.shape == (4000, 10, 4, 4) and not sampled.diagonal(dim1=2, dim2=3).any()
    assert (sampled.sum(3).sort(2).values == torch.arange(4)).all()  # sizes 0 to N - 1, each once
    only = sampled[:, :, 0] == torch.tensor([False, True, False, False])
    assert only.all(2).float().mean() == pytest.approx(1 / 12, abs=5e-3)  # 1! 2! / 4!


# ---- SHAQ ----
def test_weights_of_one_are_vdn_to_the_bit(monkeypatch):
    batch, args = make_batch(), shaq.Args()
    nets = shaq.Networks(batch, args)
    for x in nets.q_target.parameters():
        x.add_(0.1)

    def vdn():
        x, next_x = nets.inputs(batch["observations"]), nets.inputs(batch["next_observations"])
        q = nets.q(x).transpose(0, 1).gather(2, batch["actions"][..., None]).squeeze(2)
        best = nets.q(next_x).transpose(0, 1)[..., : A - 1].argmax(2, keepdim=True)
        next_q = nets.q_target(next_x).transpose(0, 1).gather(2, best).squeeze(2)
        loss = (q.sum(1) - (batch["rewards"] + 0.99 * next_q.sum(1)).detach()).square().mean()
        return loss, torch.autograd.grad(loss, list(nets.q.parameters()))

    before = loss_and_gradient(batch, nets, args)
    assert not torch.equal(before[0], vdn()[0])  # some actions are not greedy
    genuine = shaq.alpha_hat
    monkeypatch.setattr(shaq, "alpha_hat", lambda *inputs: torch.ones_like(genuine(*inputs)))
    found, expected = loss_and_gradient(batch, nets, args), vdn()
    assert torch.equal(found[0], expected[0]) and all(map(torch.equal, found[1], expected[1]))

    monkeypatch.setattr(shaq, "alpha_hat", genuine)
    batch["actions"] = nets.act(batch["observations"], batch["action_masks"])  # all greedy: the weights do not count
    found, expected = loss_and_gradient(batch, nets, args), vdn()
    assert torch.equal(found[0], expected[0]) and all(map(torch.equal, found[1], expected[1]))


def test_alpha_hat():
    batch, alive = make_batch(), torch.rand(B, N) < 0.7
    nets, q = shaq.Networks(batch, shaq.Args()), torch.randn(B, N) * 5 * alive
    earlier, state = shaq.before(q, 4), batch["states"]
    found = shaq.alpha_hat(state, q, alive, nets, earlier)
    assert (found >= 1).all() and found.std() > 0.01

    # The slow way.
    normal = (state - nets.state_mean) / nets.state_std
    for b in range(B):
        for i in range(N):
            total = 0.0
            for m in range(4):
                others = [q[b, j].item() for j in range(N) if earlier[b, m, i, j] and alive[b, j]]
                pair = torch.tensor([[[sum(others) / max(len(others), 1), q[b, i].item()]]])
                total += abs(nets.weighting(normal[b : b + 1], pair).item()) / 4
            assert found[b, i].item() == pytest.approx(1 + total, rel=1e-5)

    p = torch.tensor([2, 0, 1])  # the agents' names say nothing
    again = shaq.alpha_hat(state, q[:, p], alive[:, p], nets, earlier[:, :, p][..., p])
    assert torch.allclose(again, found[:, p])
    nets.weighting = nn.Module()
    nets.weighting.forward = lambda state, x: 0 * x.sum(2)
    assert (shaq.alpha_hat(state, q, alive, nets, earlier) == 1).all()


def test_f_s_is_its_equation():
    weighting, state, x = shaq.Weighting(7), torch.randn(B, 7), torch.randn(B, 9, 2)
    w1, w2 = weighting.w1(state).abs().view(B, 2, 32), weighting.w2(state).abs()
    hidden = nn.functional.elu(torch.einsum("bkx,bxe->bke", x, w1) + weighting.b1(state)[:, None])
    expected = torch.einsum("bke,be->bk", hidden, w2) + weighting.b2(state)
    assert torch.allclose(weighting(state, x), expected, atol=1e-6)


def test_shaq_target_is_a_plain_sum_of_double_q():
    batch, args = make_batch(), shaq.Args(gamma=0.9)
    nets = tabular(batch, args)
    batch["actions"] = nets.act(batch["observations"], batch["action_masks"])
    batch["terminals"] = torch.arange(B) == 0
    q, target, expected = nets.q.values, nets.q_target.values, 0.0
    for b in range(B):
        following = sum(target[i, b, q[i, b, : A - 1].argmax()].item() for i in range(N)) * (b > 0)
        taken = sum(q[i, b, : A - 1].max().item() for i in range(N))
        expected += (batch["rewards"][b].item() + 0.9 * following - taken) ** 2 / B
    assert shaq.shaq_loss(batch, nets, args)[0].item() == pytest.approx(expected, rel=1e-5)


def test_forbidden_actions_and_the_dead_change_nothing():
    batch, args = make_batch(), shaq.Args(alpha=0.5)
    batch["alive"] = batch["next_alive"] = torch.tensor([True, False, True]).expand(B, N)
    nets = tabular(batch, args)
    expected, gradient = loss_and_gradient(batch, nets, args)
    assert gradient[0][0].abs().max() > 0 and not gradient[0][..., -1].any() and not gradient[0][1].any()
    with torch.no_grad():
        for table in (nets.q, nets.q_target):
            table.values[..., -1] += 100  # forbidden
            table.values[1] += torch.randn(B, A) * 100  # dead
    assert torch.equal(loss_and_gradient(batch, nets, args)[0], expected)


# ---- SHAQ-CQL ----
def test_penalty():
    batch = make_batch()
    nets = tabular(batch, shaq.Args())
    found = {w: loss_and_gradient(batch, nets, shaq.Args(alpha=w)) for w in (0.0, 1.0, 2.0)}
    penalty, gradient = found[1.0][0] - found[0.0][0], found[1.0][1][0] - found[0.0][1][0]
    assert penalty > 0 and (found[2.0][0] - found[0.0][0]).item() == pytest.approx(2 * penalty.item(), rel=1e-3)
    assert gradient.abs().max() > 0.01 and torch.allclose(gradient.sum(2), torch.zeros(N, B), atol=1e-5)

    def of(values, actions):
        batch["actions"] = torch.tensor(actions).expand(B, -1)
        with torch.no_grad():
            nets.q.values.copy_(torch.tensor(values)[:, None])
        one, none = (loss_and_gradient(batch, nets, shaq.Args(alpha=w))[0] for w in (1.0, 0.0))
        return (one - none).item()

    assert of([[3.0] * 4 + [50.0]] * N, [0, 1, 2]) == pytest.approx(N * 1.386294, rel=1e-4)  # log 4 for each agent
    # The third agent has one choice that counts. An additive mixer's joint penalty is the sum: 3.626523 - 2.
    low = [-1e3] * 3
    assert of([[1.0, 2.0, *low], [0.0, 1.0, *low], [0.0, -1e3, *low]], [1, 0, 0]) == pytest.approx(1.626523, rel=1e-3)


def test_the_target_is_renewed_every_third_update():
    batch, args = make_batch(), shaq.Args(target_interval=3)
    nets, renewed = shaq.Networks(batch, args), []
    for _ in range(6):
        shaq.update(batch, nets, args)
        renewed.append(all(map(torch.equal, nets.q.parameters(), nets.q_target.parameters())))
    assert renewed == [False, False, True] * 2


# ---- SQDDPG ----
def game(v):
    """A critic that knows the coalitions' values: v(C and i) - v(C)."""

    def critic(state, actions, members):
        return v(members) - v(members & ~torch.eye(members.shape[3], dtype=torch.bool))

    return critic


@pytest.mark.parametrize(
    "v, expected",
    [
        (lambda c: (c[..., 2] & (c[..., 0] | c[..., 1])).float(), [1 / 6, 1 / 6, 2 / 3]),  # gloves
        (lambda c: (c * torch.tensor([1.0, -2.0, 3.0])).sum(-1), [1.0, -2.0, 3.0]),  # a sum
        (lambda c: c.all(-1).float(), [1 / 3] * 3),  # alike
        (lambda c: (c[..., 0] & c[..., 1]).float(), [0.5, 0.5, 0.0]),  # one of no use
    ],
)
def test_averages_are_the_shapley_values_of_known_games(v, expected):
    alive, actions = torch.ones(B, 3, dtype=torch.bool), torch.zeros(B, 3, 2)
    q = sqddpg.shapley(game(v), torch.zeros(B, 1), actions, alive, shaq.before(alive, 10))
    assert torch.allclose(q, torch.tensor(expected).expand(B, 3), atol=1e-6)
    one = sqddpg.shapley(game(v), torch.zeros(B, 1), actions, alive, shaq.before(alive, 1))
    assert torch.allclose(one.sum(1), v(alive))  # v(all), in every single order


def test_the_dead_are_no_players():
    alive, actions = torch.tensor([[True, False, True]]).expand(B, 3), torch.zeros(B, 3, 2)
    gloves = game(lambda c: (c[..., 2] & (c[..., 0] | c[..., 1])).float())
    q = sqddpg.shapley(gloves, torch.zeros(B, 1), actions, alive, shaq.before(alive, 10))
    assert torch.allclose(q, torch.tensor([0.5, 0.0, 0.5]).expand(B, 3))


def test_absent_agents_have_no_effect():
    critic, state, actions = sqddpg.Critic(N, 7, A, 8), torch.randn(B, 7), torch.randn(B, N, A)
    alive = torch.tensor([True, True, False]).expand(B, N)
    members = (shaq.before(alive, 10) | torch.eye(N, dtype=torch.bool)) & alive[:, None, None]
    first = critic(state, actions[:, None].expand(-1, N, -1, -1), members)
    for j in range(N):
        changed = actions.clone()
        changed[:, j] += 1
        differs = critic(state, changed[:, None].expand(-1, N, -1, -1), members) != first  # [B, M, N]
        assert torch.equal(differs, members[..., j])


def test_actor_gradient_goes_through_the_own_action_alone():
    critic, alive = sqddpg.Critic(N, 7, A, 8), torch.ones(B, N, dtype=torch.bool)
    state, actions = torch.randn(B, 7), torch.randn(B, N, A, requires_grad=True)
    q = sqddpg.shapley(critic, state, actions, alive, shaq.before(alive, 10))
    (everyone,) = torch.autograd.grad(q.sum(), actions, retain_graph=True)
    for j in range(N):
        (own,) = torch.autograd.grad(q[:, j].sum(), actions, retain_graph=True)
        assert torch.equal(own[:, j], everyone[:, j]) and own[:, j].abs().min() > 0
        assert not own[:, [i for i in range(N) if i != j]].any()


@pytest.mark.parametrize("discrete", [True, False])
def test_sqddpg_target(discrete):
    batch, args = make_batch(discrete), sqddpg.Args(orders=6, gamma=0.9)
    nets = sqddpg.Networks(batch, args)
    nets.critic = nn.Module()
    nets.critic.forward = lambda state, actions, members: torch.zeros(B, 6, N)  # all orders
    nets.critic_target = nn.Module()
    nets.critic_target.forward = lambda state, actions, members: torch.ones(B, 6, N)
    batch["terminals"] = torch.arange(B) == 0  # y = R
    batch["has_next_state"] = torch.arange(B) != 1  # a time limit
    batch["next_alive"] = torch.arange(B)[:, None].expand(B, N) != 2
    future = 0.9 * N * torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    expected = (batch["rewards"] + future).square()[[0, 2, 3, 4, 5]].mean()
    assert torch.allclose(sqddpg.critic_loss(batch, nets, args)[0], expected)


@pytest.mark.parametrize("discrete", [True, False])
def test_the_actors_step_leaves_the_critic_alone(discrete, monkeypatch):
    batch, args = make_batch(discrete), sqddpg.Args(learning_rate=1e-2)
    nets = sqddpg.Networks(batch, args)
    seen, genuine = [], sqddpg.actor_loss

    def watched(*inputs):
        seen.extend(x.clone() for x in nets.critic.parameters())
        return genuine(*inputs)

    monkeypatch.setattr(sqddpg, "actor_loss", watched)
    old = [x.clone() for x in (*nets.actor.parameters(), *nets.critic.parameters())]
    again = copy.deepcopy(nets)
    torch.manual_seed(0)
    sqddpg.update(batch, nets, args)
    assert all(map(torch.equal, seen, nets.critic.parameters()))
    assert not any(map(torch.equal, old, (*nets.actor.parameters(), *nets.critic.parameters())))

    for x in (*again.actor.parameters(), *again.critic.parameters()):
        x.grad = torch.ones_like(x)  # as an earlier actor's loss leaves it in the critic
    torch.manual_seed(0)
    sqddpg.update(batch, again, args)
    assert all(map(torch.equal, nets.parameters(), again.parameters()))


# ---- learning ----
@pytest.mark.parametrize("system", ["shaq", "shaq-cql", "sqddpg"])
def test_the_best_joint_action_of_a_matrix_game(system):
    """One step, two states, uniform data; in state 1 the best joint action is another. The fourth action is forbidden.

    The best joint action is not that of the worst case, and its entry is no sum of two numbers.
    """
    payoff = torch.tensor([[6.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    payoffs = torch.stack([payoff, payoff.roll((2, 1), (0, 1))])  # best: (0, 0) and (2, 1)
    T = 2000
    seen, actions = torch.randint(2, (T,)), torch.randint(3, (T, 2))
    data = make_batch(n=2)
    data = {name: x[:1].expand(T, *x.shape[1:]) for name, x in data.items()}
    data |= {"observations": (2.0 * seen - 1)[:, None, None].expand(T, 2, 1), "terminals": torch.ones(T) > 0}
    data |= {"next_observations": data["observations"], "states": (2.0 * seen - 1)[:, None], "actions": actions}
    data |= {"next_states": data["states"], "rewards": payoffs[seen, actions[:, 0], actions[:, 1]]}
    data |= {name: (torch.arange(4) < 3).expand(T, 2, 4) for name in ("action_masks", "next_action_masks")}
    if system == "sqddpg":
        args = sqddpg.Args(learning_rate=3e-3)
        nets = sqddpg.Networks(data, args)
        for _ in range(400):
            sqddpg.update(macca_icq.sample(data, 256), nets, args)
    else:
        args = shaq.Args(alpha=0.2 * (system == "shaq-cql"), learning_rate=3e-3)
        nets = shaq.Networks(data, args)
        for _ in range(400):
            shaq.update(macca_icq.sample(data, 256), nets, args)
    played = nets.act(torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 2, 1), data["action_masks"][:2])
    assert played.tolist() == [[0, 0], [2, 1]]


# ---- scripts ----
@pytest.mark.parametrize("script, discrete", [("shaq", True), ("sqddpg", True), ("sqddpg", False)])
def test_a_run_is_a_row_of_a_table(script, discrete, tmp_path, monkeypatch):
    path, env = toy.write(tmp_path / "data.npz", discrete), "toy:matching" + "_discrete" * discrete
    flags = f"--env {env} --dataset {path} --seed 3 --total-iterations 4 --eval-interval 2 --final-episodes 2"
    status, _, stderr = toy.run(f"paper/{script}", tmp_path, *flags.split(), monkeypatch=monkeypatch)
    assert status == 0, stderr
    run = toy.run_folder(tmp_path)
    with open(run / "metrics.csv") as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["2", "4"]
    assert json.loads((run / "config.json").read_text())["args"]["seed"] == 3
    training = runs.Training.__new__(runs.Training)  # as if paper/runs.py had started it
    training.folder, training.command = types.SimpleNamespace(name=str(tmp_path)), f"paper/{script}.py {flags}"
    training.label, training.seed, training.started, training.commit = script, 3, time.monotonic(), ""
    row = training.row()
    assert row["iterations"] == "4" and float(row["return"]) and row["curve"].startswith("2:")
    assert row["dataset_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_bad_input_ends_in_one_sentence(tmp_path, monkeypatch):
    path = toy.write(tmp_path / "data.npz")
    flags = ["--env", "toy:matching", "--dataset", path]
    for script, more, said in (
        ("shaq", [], "this algorithm needs discrete ones"),
        ("sqddpg", ["--gamma", "2"], "--gamma is 2.0, expected 0 to 1"),
        ("sqddpg", ["--dataset", tmp_path / "none.npz"], "does not exist"),
    ):
        status, _, stderr = toy.run(f"paper/{script}", tmp_path, *flags, *more, monkeypatch=monkeypatch)
        assert status == 2 and stderr.startswith(f"{script}.py: ") and said in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
