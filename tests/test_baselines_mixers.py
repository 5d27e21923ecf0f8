"""QMIX-CQL and MA-ICQ: mixers, targets and weights against hand-worked values, a matrix game, whole runs."""

import csv
import itertools
import json
import math
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy

import macca_icq

sys.path.insert(0, str(toy.ROOT / "paper"))
import ma_icq
import qmix_cql

SMALL = {"cuda": False, "batch_size": 64}
Q_ARGS, I_ARGS = qmix_cql.Args(**SMALL), ma_icq.Args(**SMALL)


def make_data(rows=40, agents=3, actions=4, discrete=True, states=True):
    """Random rows [T, ...]; the last action of every agent is illegal, everybody lives, no row ends an episode."""
    data = {
        "observations": torch.randn(rows, agents, 5),
        "next_observations": torch.randn(rows, agents, 5),
        "rewards": torch.randn(rows),
        **{name: torch.zeros(rows, dtype=torch.bool) for name in ("terminals", "timeouts")},
        **{name: torch.ones(rows, dtype=torch.bool) for name in ("has_next_action", "has_next_state")},
        **{name: torch.ones(rows, agents, dtype=torch.bool) for name in ("alive", "next_alive")},
    }
    if states:
        data |= {"states": torch.randn(rows, 7), "next_states": torch.randn(rows, 7)}
    for name in ("actions", "next_actions"):
        shape, low = (rows, agents), torch.rand(rows, agents, actions) * 2 - 1
        data[name] = torch.randint(actions - 1, shape) if discrete else low
    if discrete:
        mask = torch.ones(rows, agents, actions, dtype=torch.bool)
        mask[..., -1] = False
        data |= {"action_masks": mask, "next_action_masks": mask.clone()}
    return data


def shift_output(network, agent, action, amount):
    """Adds to one output of one agent's network, whatever its input."""
    layer = network[-1] if isinstance(network, torch.nn.Sequential) else network.layer3
    with torch.no_grad():
        layer.bias[agent, 0, action] += amount


def q_loss(batch, nets, args=Q_ARGS):
    torch.manual_seed(1)  # of the joint actions
    return qmix_cql.loss(batch, nets, args)


# ---- QMIX-CQL ----
def test_q_tot_rises_with_every_agent():
    mixer = qmix_cql.Mixer(4, 7, 32, 64)
    q = (3 * torch.randn(200, 5, 4)).requires_grad_()
    (slope,) = torch.autograd.grad(mixer(q, 3 * torch.randn(200, 7)).sum(), q)
    assert (slope >= 0).all() and slope.mean() > 0.01


def test_q_tot_by_hand():
    """elu(1 * 1 - 1 * 2) * 3 + 4, where the hypernetworks give -1, 2 and -3."""
    mixer = qmix_cql.Mixer(2, 7, 1, 8)
    outputs = (mixer.weight1[2], [-1.0, 2.0]), (mixer.weight2[2], [-3.0]), (mixer.bias1, [0.0]), (mixer.value[2], [4.0])
    with torch.no_grad():
        for layer, value in outputs:
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor(value))
    q = torch.tensor([[[1.0, -1.0]]], requires_grad=True)
    total = mixer(q, torch.randn(1, 7))
    total.backward()
    torch.testing.assert_close(total, torch.tensor([[2.103638]]))
    torch.testing.assert_close(q.grad, torch.tensor([[[1.103638, 2.207277]]]))


def test_best_joint_action_is_everybodys_best():
    mixer, q = qmix_cql.Mixer(3, 7, 32, 64), torch.randn(50, 3, 4)
    joint = torch.tensor(list(itertools.product(range(4), repeat=3)))  # [64, 3]
    values = mixer(q[:, torch.arange(3), joint], torch.randn(50, 7))  # [50, 64]
    assert torch.equal(joint[values.argmax(1)], q.argmax(2))


def stand_in(online, bar):
    """Networks that ignore their input and give fixed values [N, A]; the mixer is the sum."""

    def table(values):
        return lambda x: torch.tensor(values)[:, None].expand(-1, x.shape[1], -1)

    mixer = {name: lambda q, state: q.sum(2) for name in ("mixer", "mixer_target")}
    plain = {"inputs": lambda x: x.transpose(0, 1), "states": lambda x: x}
    return SimpleNamespace(agents=table(online), agents_target=table(bar), **mixer, **plain)


def test_target_by_hand():
    """The online values choose among legal actions, the targets' are used; a terminal ends it, a death does not."""
    nets = stand_in([[1.0, 3, 9], [2, 1, 9]], [[10.0, 20, 99], [30, 40, 99]])  # chosen: 1 and 0, 20 + 30
    batch = make_data(3, agents=2, actions=3) | {"rewards": torch.tensor([1.0, 2, 3])}
    batch["terminals"][1] = True
    batch["next_alive"][2, 0] = False
    y = qmix_cql.target(batch, nets, qmix_cql.Args(cuda=False, gamma=0.5))
    torch.testing.assert_close(y, torch.tensor([26.0, 2, 18]))


def test_penalty_by_hand(monkeypatch):
    """An additive mixer: over all joint actions log sum exp is 3.626523, the sum of the agents'; a is in once more."""
    everything = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])  # [N, K]
    monkeypatch.setattr(torch, "multinomial", lambda p, k, replacement: everything)
    nets = stand_in([[1.0, 2], [0, 1]], [[0.0, 0], [0, 0]])
    batch = make_data(1, agents=2, actions=2) | {"actions": torch.tensor([[1, 0]])}  # Q_tot = 2
    args = qmix_cql.Args(cuda=False, cql_samples=4)
    expected = math.log(math.exp(3.626523) + math.exp(2)) - 2
    assert q_loss(batch, nets, args)[1]["penalty"].item() == pytest.approx(expected, abs=1e-5)


def test_penalty_of_equal_and_of_shifted_values():
    data = make_data()
    nets = qmix_cql.Networks(data, Q_ARGS)
    before = q_loss(data, nets)[1]["penalty"]
    values = qmix_cql.joint_values(data, nets, Q_ARGS)
    assert values.shape == (40, 21) and (values.logsumexp(1) > values[:, 0]).all() and values.std(1).min() > 0
    with torch.no_grad():
        nets.mixer.value[2].bias += 5
    torch.testing.assert_close(q_loss(data, nets)[1]["penalty"], before)
    with torch.no_grad():
        for parameter in nets.agents.parameters():
            parameter.zero_()
    assert q_loss(data, nets)[1]["penalty"].item() == pytest.approx(math.log(21), abs=1e-4)


def test_without_penalty_it_is_qmix():
    """To the bit, whichever joint actions were drawn; and the gradient is that of the squared error alone."""
    data, weights = make_data(), []
    for seed in (1, 2):
        torch.manual_seed(0)
        nets, args = qmix_cql.Networks(data, Q_ARGS), qmix_cql.Args(cuda=False, cql_weight=0)
        torch.manual_seed(seed)
        for _ in range(3):
            qmix_cql.update(data, nets, args)
        weights.append(torch.cat([x.flatten() for x in nets.parameters()]))
    assert torch.equal(*weights)
    q = nets.agents(nets.inputs(data["observations"])).transpose(0, 1).gather(2, data["actions"][..., None])
    total = nets.mixer(q.transpose(1, 2), nets.states(data["states"])).squeeze(1)
    expected = 0.5 * (total - qmix_cql.target(data, nets, args)).square().mean()
    torch.testing.assert_close(q_loss(data, nets, args)[0], expected)
    assert q_loss(data, nets)[0] > expected  # with a penalty


def test_illegal_actions_have_no_effect():
    data = make_data()
    nets = qmix_cql.Networks(data, Q_ARGS)

    def seen():
        chosen = nets.act(data["observations"], data["action_masks"])
        return [q_loss(data, nets)[0].item(), *chosen.flatten().tolist()]

    before = seen()
    for network in (nets.agents, nets.agents_target):
        shift_output(network, 1, 3, 1e4)
    assert seen() == before
    shift_output(nets.agents, 1, 2, 1.0)
    assert seen() != before


def test_what_follows_a_terminal_or_a_time_limit_does_not_count():
    data = make_data()
    data["terminals"][:20] = True
    data["timeouts"][30:], data["has_next_state"][30:] = True, False
    nets = qmix_cql.Networks(data, Q_ARGS)
    before = q_loss(data, nets)[0]
    torch.testing.assert_close(qmix_cql.target(data, nets, Q_ARGS)[:20], data["rewards"][:20], rtol=0, atol=0)
    for name in ("next_states", "next_observations"):
        data[name][:20] += 100
        data[name][30:] += 100
    data["rewards"][30:] += 100
    assert torch.equal(q_loss(data, nets)[0], before)
    data["next_states"][20:30] += 100
    assert not torch.equal(q_loss(data, nets)[0], before)


def test_values_of_the_dead_do_not_count():
    data = make_data()
    data["alive"][:, 1] = data["next_alive"][:, 1] = False
    nets = qmix_cql.Networks(data, Q_ARGS)
    before = q_loss(data, nets)[0]
    for network, action in itertools.product((nets.agents, nets.agents_target), range(4)):
        shift_output(network, 1, action, 10.0 * action)
    assert torch.equal(q_loss(data, nets)[0], before)


def test_targets_are_copied_by_interval():
    data = make_data()
    nets, args = qmix_cql.Networks(data, Q_ARGS), qmix_cql.Args(cuda=False, target_interval=2)
    for expected in (False, True, False, True):
        qmix_cql.update(data, nets, args)
        same = torch.equal(nets.agents[0].weight, nets.agents_target[0].weight)
        assert same == torch.equal(nets.mixer.bias1.weight, nets.mixer_target.bias1.weight) == expected
    nets, args = ma_icq.Networks(data, I_ARGS), ma_icq.Args(cuda=False, target_interval=2)
    for expected in (False, True, False, True):
        ma_icq.update(data, nets, args)
        same = torch.equal(nets.critic.layer2.weight, nets.critic_target.layer2.weight)
        assert same == torch.equal(nets.mixer.weight1.weight, nets.mixer_target.weight1.weight) == expected


# ---- MA-ICQ ----
def test_mixer_weights_are_shares():
    mixer, alive = ma_icq.Mixer(4, 7, 32), torch.rand(100, 4) > 0.3
    alive[0] = False
    k = mixer(torch.randn(100, 7), alive)
    assert (k >= 0).all() and (k[~alive] == 0).all() and k.std(0).min() > 0
    torch.testing.assert_close(k.sum(1), alive.any(1).float())
    torch.testing.assert_close(ma_icq.Mixer(1, 7, 32)(torch.randn(9, 7), torch.ones(9, 1) > 0), torch.ones(9, 1))


def test_softmax_weights_by_hand():
    weights, every = ma_icq.softmax_weights, torch.tensor([True, True])
    two = weights(torch.tensor([0.0, 0.1]), every, 0.1)
    torch.testing.assert_close(two, torch.tensor([0.537883, 1.462117]))
    torch.testing.assert_close(weights(torch.tensor([0.0, 10]), every, 1000), torch.tensor([0.995, 1.005]))
    values, valid = torch.randn(3, 50), torch.rand(3, 50) > 0.2
    found = weights(values, valid, 0.3)
    torch.testing.assert_close(found.sum(1), valid.sum(1).float())
    assert (found[~valid] == 0).all()
    torch.testing.assert_close(weights(values, valid, 1e8), valid.float())
    best = values.masked_fill(~valid, -9).argmax(1)
    torch.testing.assert_close(weights(values, valid, 1e-5), F.one_hot(best, 50) * valid.sum(1, keepdim=True).float())


@pytest.mark.parametrize("discrete", [True, False])
def test_critic_loss_in_loops(discrete):
    data, (agents, rows) = make_data(discrete=discrete), (3, 40)
    data["terminals"][:5], data["timeouts"][5:9] = True, True
    data["has_next_action"][:9] = False
    data["next_alive"][20, 1] = False
    args = ma_icq.Args(cuda=False, critic_beta=2.0, gamma=0.9)
    nets = ma_icq.Networks(data, args)
    for target in (nets.critic_target, nets.mixer_target):
        for parameter in target.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)

    def q_tot(critic, mixer, prefix):
        total = torch.zeros(rows)
        x, state = nets.inputs(data[f"{prefix}observations"]), nets.states(data[f"{prefix}states"])
        k = mixer(state, data[f"{prefix}alive"])
        for b, i in itertools.product(range(rows), range(agents)):
            both = torch.cat([x[:, b], state[b].expand(agents, -1)], dim=1)[:, None]
            action = data[f"{prefix}actions"][b, i]
            played = None if discrete else data[f"{prefix}actions"][b][:, None, None]
            q = critic(both, played, twins=1)[0, i, 0]
            total[b] += k[b, i] * (q[action] if discrete else q[0])
        return total

    following = q_tot(nets.critic_target, nets.mixer_target, "next_")
    v = 31 * (following[9:] / 2.0).softmax(0)
    y = data["rewards"].clone()
    y[9:] += 0.9 * v * following[9:]
    errors = (q_tot(nets.critic, nets.mixer, "") - y).square()
    expected = (errors[:5].sum() + errors[9:].sum()) / 36
    torch.testing.assert_close(ma_icq.critic_loss(data, nets, args)[0], expected)


def test_critic_never_asks_for_actions_that_the_data_lack():
    data = make_data()
    for name in ("actions", "next_actions"):
        data[name].clamp_(max=1)  # 2 is legal, but nobody took it
    nets = ma_icq.Networks(data, I_ARGS)
    before = ma_icq.critic_loss(data, nets, I_ARGS)[0]
    for critic, agent, action in itertools.product((nets.critic, nets.critic_target), range(3), (2, 3)):
        shift_output(critic, agent, action, 1e4)
    assert torch.equal(ma_icq.critic_loss(data, nets, I_ARGS)[0], before)
    shift_output(nets.critic, 0, 1, 1.0)
    assert not torch.equal(ma_icq.critic_loss(data, nets, I_ARGS)[0], before)


@pytest.mark.parametrize("discrete", [True, False])
def test_actor_loss_in_loops(discrete):
    data = make_data(discrete=discrete)
    data["alive"][3, 1] = data["alive"][7, 2] = False
    args = ma_icq.Args(cuda=False, beta=0.05)
    nets = ma_icq.Networks(data, args)
    x, state = nets.inputs(data["observations"]), nets.states(data["states"])
    out, k = nets.actor(x).detach(), nets.mixer(state, data["alive"]).detach()
    advantage, distance = torch.zeros(3, 40), torch.zeros(3, 40)
    for b, i in itertools.product(range(40), range(3)):
        both, action = torch.cat([x[:, b], state[b].expand(3, -1)], dim=1)[:, None], data["actions"][b, i]
        if discrete:
            pi, q = out[i, b, :3].softmax(0), nets.critic(both, twins=1)[0, i, 0].detach()
            advantage[i, b], distance[i, b] = q[action] - (pi * q[:3]).sum(), -pi[action].log()
        else:
            played = torch.stack([action, out[i, b].tanh()])[None, None].expand(3, -1, -1, -1)
            q = nets.critic(both, played, twins=1)[0, i, 0].detach()
            advantage[i, b], distance[i, b] = q[0] - q[1], (out[i, b].tanh() - action).square().sum()
    expected = 0
    for i in range(3):
        living = [b for b in range(40) if data["alive"][b, i]]
        u = len(living) * (advantage[i, living] / 0.05).softmax(0)
        expected += (k[living, i] * u * distance[i, living]).sum()
    loss, _ = ma_icq.actor_loss(data, nets, args)
    torch.testing.assert_close(loss, expected / (3 * 40 - 2))
    critics = [*nets.critic.parameters(), *nets.mixer.parameters()]
    assert all(g is None for g in torch.autograd.grad(loss, critics, allow_unused=True))


def test_huge_temperatures_clone_and_follow_the_data():
    """Equal k_i and u_i: cloning / N; v = 1: SARSA."""
    data = make_data()
    args = ma_icq.Args(cuda=False, beta=1e8, critic_beta=1e8)
    nets = ma_icq.Networks(data, args)
    with torch.no_grad():
        for parameter in nets.mixer.parameters():
            parameter.fill_(0.5 if parameter.dim() == 1 else 0.0)
    logits = nets.actor(nets.inputs(data["observations"])).masked_fill(~data["action_masks"].transpose(0, 1), -1e9)
    cloning = F.cross_entropy(logits.flatten(0, 1), data["actions"].T.flatten())
    torch.testing.assert_close(ma_icq.actor_loss(data, nets, args)[0], cloning / 3)
    assert ma_icq.actor_loss(data, nets, args)[1]["rows_used"].item() == pytest.approx(1)
    with torch.no_grad():
        for critic, value in ((nets.critic, 2.0), (nets.critic_target, 3.0)):  # Q_i = c gives Q_tot = c
            critic.layer3.weight.zero_()
            critic.layer3.bias.fill_(value)
    expected = (data["rewards"] + args.gamma * 3 - 2).square().mean()
    torch.testing.assert_close(ma_icq.critic_loss(data, nets, args)[0], expected)


def test_actor_knows_neither_illegal_actions_nor_the_dead():
    data = make_data()
    data["alive"][:, 2] = False
    nets = ma_icq.Networks(data, I_ARGS)
    before = ma_icq.actor_loss(data, nets, I_ARGS)[0]
    chosen = nets.act(data["observations"], data["action_masks"])
    for network, (agent, action) in itertools.product((nets.actor, nets.critic), ((0, 3), (2, 1))):
        shift_output(network, agent, action, 50.0)
    assert torch.equal(ma_icq.actor_loss(data, nets, I_ARGS)[0], before)
    assert torch.equal(nets.act(data["observations"], data["action_masks"])[:, :2], chosen[:, :2])


# ---- both ----
REWARDS = torch.tensor(
    [
        [[0.0, 1, 0.5], [2, 5, 3], [3, 9, 5]],  # where the agents see 0, the best joint action is (2, 1)
        [[6, 7, 12], [2, 3, 5], [0, 1, 3]],  # and (0, 2) where they see 1; no sum of two terms is R
    ]
)


GAME = [(qmix_cql, {"cql_weight": 0.5}), (ma_icq, {"learning_rate": 1e-2, "beta": 0.1})]


@pytest.mark.parametrize(("module", "setting"), GAME)
def test_matrix_game(module, setting):
    """One step, all actions equally often: the best joint action is found, and no illegal fourth one is played."""
    data = make_data(2000, agents=2, states=False)
    seen = torch.arange(2000) % 2
    data["observations"] = torch.stack([seen, seen], dim=1)[..., None].float()
    data["next_observations"] = torch.randn_like(data["observations"])
    data["rewards"] = REWARDS[seen, data["actions"][:, 0], data["actions"][:, 1]] / 3
    data["terminals"][:], data["has_next_action"][:] = True, False
    args = module.Args(cuda=False, batch_size=256, **{"learning_rate": 3e-3, **setting})
    nets = module.Networks(data, args)
    for _ in range(300):
        module.update(macca_icq.sample(data, 256), nets, args)
    chosen = nets.act(data["observations"][:2], data["action_masks"][:2])
    assert chosen.tolist() == [[2, 1], [0, 2]]


def test_continuous_matrix_game():
    """R is the negative squared distance of the joint action to (x, -x), in one step from random actions."""
    data = make_data(2000, agents=2, actions=1, discrete=False, states=False)
    x = torch.rand(2000) * 1.6 - 0.8
    data["observations"] = torch.stack([x, x], dim=1)[..., None]
    data["next_observations"] = torch.randn_like(data["observations"])
    best = torch.stack([x, -x], dim=1)[..., None]
    data["rewards"] = -(data["actions"] - best).square().sum((1, 2))
    data["terminals"][:], data["has_next_action"][:] = True, False
    args = ma_icq.Args(cuda=False, learning_rate=1e-2, beta=0.02)
    nets = ma_icq.Networks(data, args)
    for _ in range(400):
        ma_icq.update(macca_icq.sample(data, 256), nets, args)
    assert (nets.act(data["observations"], data["alive"]) - best).square().mean() < 0.02


@pytest.mark.parametrize("states", [True, False])
def test_next_states_are_found_before_episodes_are_held_out(tmp_path, states):
    """State t is t, so the next one is t + 1; a time limit has none, unless the state is the observations."""
    index = np.arange(200, dtype=np.float32)[:, None]
    more = {"states": index, "metadata": {"state_owner": [0]}} if states else {}
    path = toy.write(tmp_path / "toy.npz", discrete=True, transitions=200, **more)
    args = qmix_cql.Args(env="toy:matching_discrete", dataset=str(path), cuda=False)
    data, _, about = qmix_cql.load(args, toy.matching_discrete())
    assert about["transitions"] == len(data["rewards"]) < 200 and len(about["dataset_sha256"]) == 64
    assert not {"individual_rewards", "shapley_rewards"} & {*data} and data["timeouts"].any()
    now, following = qmix_cql.joint_states(data)
    if states:
        assert torch.equal(data["has_next_state"], ~data["timeouts"])
        torch.testing.assert_close(following[data["has_next_state"]], now[data["has_next_state"]] + 1)
    else:
        assert data["has_next_state"].all()
        assert torch.equal(now, data["observations"].flatten(1))
        assert torch.equal(following, data["next_observations"].flatten(1))


@pytest.mark.parametrize("standardized", [True, False])
def test_rewards_in_units_of_their_deviation(tmp_path, standardized):
    path = toy.write(tmp_path / "toy.npz", discrete=True, transitions=200)
    args = qmix_cql.Args(env="toy:matching_discrete", dataset=str(path), cuda=False, standardize_rewards=standardized)
    rewards, raw = qmix_cql.load(args, toy.matching_discrete())[0]["rewards"], np.load(path)["rewards"]
    expected = np.unique((raw - raw.mean()) / raw.std(ddof=1) if standardized else raw)
    np.testing.assert_allclose(np.unique(rewards), expected, atol=1e-4)


RUNS = [("qmix_cql", True), ("ma_icq", True), ("ma_icq", False)]


def start(script, folder, discrete, *flags, monkeypatch):
    monkeypatch.setattr(macca_icq, "__file__", macca_icq.__file__)  # a run gives it its own name
    path = toy.write(folder / "toy.npz", discrete=discrete, transitions=200)
    env = "toy:matching_discrete" if discrete else "toy:matching"
    common = ["--env", env, "--dataset", path, "--no-cuda", "--batch-size", 32, "--final-episodes", 3]
    return toy.run(f"paper/{script}", folder, *common, *flags, monkeypatch=monkeypatch)


@pytest.mark.parametrize(("script", "discrete"), RUNS)
def test_a_run_leaves_what_a_table_needs(tmp_path, monkeypatch, script, discrete):
    flags = ["--total-iterations", 6, "--eval-interval", 4, "--eval-episodes", 2]
    status, stdout, stderr = start(script, tmp_path, discrete, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    run = toy.run_folder(tmp_path)
    config = json.loads((run / "config.json").read_text())
    assert len(config["dataset_sha256"]) == 64 and config["args"]["total_iterations"] == 6
    table = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["iteration"] for row in table] == ["4", "6"] and [row["episodes"] for row in table] == ["2", "3"]
    assert all(math.isfinite(float(value)) for row in table for value in row.values())
    assert {"return", "q_data", "q_max"} <= {*table[0]} and f"run folder: runs/{run.name}" in stdout


@pytest.mark.parametrize(
    ("script", "discrete", "flags", "said"),
    [
        ("qmix_cql", False, [], "--env toy:matching has continuous actions, this algorithm needs discrete ones"),
        ("qmix_cql", True, ["--gamma", 2], "--gamma is 2.0, expected 0 to 1"),
        ("ma_icq", True, ["--beta", 0], "--beta is 0.0, expected 1e-06 to 1e+09"),
        ("ma_icq", True, ["--dataset", "nowhere.npz"], "nowhere.npz does not exist"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, monkeypatch, script, discrete, flags, said):
    status, _, stderr = start(script, tmp_path, discrete, *flags, monkeypatch=monkeypatch)
    assert status == 2 and stderr.startswith(f"{script}.py: ") and said in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_ends_between_updates(tmp_path, monkeypatch):
    toy.after(5, lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch)
    status, stdout, _ = start("ma_icq", tmp_path, True, monkeypatch=monkeypatch)
    assert status == 130 and "stopped at iteration 5" in stdout
    assert [path.name for path in toy.run_folder(tmp_path).iterdir()] == ["config.json"]
