"""What an update may touch and what it must not, the four kinds of credit, and that each script learns a tiny task."""

import csv
import dataclasses
import importlib

import numpy as np
import pytest
import torch
import toy

from causal_model import CausalModel

SCRIPTS = [importlib.import_module(name) for name in toy.SCRIPTS]
N, OBS = 2, 2  # agents, observation


def make(script, discrete=False, **changes):
    """(args, networks, causal model, optimizers) as a run makes them, and a dataset: the same for the same seed."""
    known = {field.name for field in dataclasses.fields(script.Args)}
    assert changes.keys() <= known
    args = script.Args(cuda=False, hidden_dim=16, **changes)
    action_dim = 5 if discrete else 2
    torch.manual_seed(0)
    nets = script.Networks(N, OBS, action_dim, discrete, args)
    model = CausalModel(
        N, N * OBS, action_dim, args.graph, [0, 0, 1, 1], args.anchor, args.lambda1, args.lambda2, args.h
    )
    optimizers = {
        "causal": torch.optim.Adam(model.parameter_groups(args.causal_learning_rate)),
        "critic": torch.optim.Adam(nets.critic.parameters(), lr=args.learning_rate),
        "actor": torch.optim.Adam(nets.actor.parameters(), lr=args.learning_rate),
    }
    return args, nets, model, optimizers


def make_data(discrete=False, transitions=64):
    arrays = toy.record(toy.Matching(discrete), transitions)
    arrays["next_actions"] = np.roll(arrays["actions"], -1, axis=0)
    arrays["has_next_action"] = ~arrays["timeouts"]
    arrays["alive"] = arrays["next_alive"] = np.ones((transitions, N), bool)
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def weights(*modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def same(before, after):
    return all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def updated(script, data, iterations=3, discrete=False, policy=True, causal=True, **changes):
    """Networks and causal model after some updates on the whole of `data`, always with the same random numbers."""
    args, nets, model, optimizers = make(script, discrete, **changes)
    for iteration in range(iterations):
        torch.manual_seed(iteration)
        script.update(data, nets, model, optimizers, args, policy, causal)
    return nets, model


# ---- what an update may touch ----


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_policy_and_causal_model_learn_from_their_own_losses(script, discrete):
    """The policy's losses must not move the causal model, and the causal loss must move nothing else."""
    data = make_data(discrete)
    args, nets, model, _ = make(script, discrete)
    start, causal_start = weights(nets), weights(model)
    _, both_model = updated(script, data, iterations=1, discrete=discrete)
    only_policy, frozen = updated(script, data, iterations=1, discrete=discrete, causal=False)
    untouched, only_causal = updated(script, data, iterations=1, discrete=discrete, policy=False)
    assert same(causal_start, weights(frozen)) and same(start, weights(untouched))
    assert not same(causal_start, weights(only_causal)) and not same(start, weights(only_policy))
    assert same(weights(both_model), weights(only_causal))  # the policy beside it changed nothing
    # Nor is there a path in the graph: the losses that the policy is trained on do not know the causal model.
    rewards = script.assign_credit(data, args, model, nets.actor.action_dim)
    assert not rewards.requires_grad
    for value, _ in (script.critic_loss(data, rewards, nets, args), script.actor_loss(data, nets, args)):
        found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, retain_graph=True)
        assert all(gradient is None for gradient in found)
    causal_loss, _ = model.loss(*script.causal_inputs(data, nets.actor.action_dim), data["rewards"])
    found = torch.autograd.grad(causal_loss, trained(nets), allow_unused=True)
    assert all(gradient is None for gradient in found)


def trained(nets):
    return [parameter for parameter in nets.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_network_moves(script):
    """An update that forgets the critics, a target or the second twin would still run."""
    args, nets, model, _ = make(script)
    start = weights(nets)
    after, _ = updated(script, make_data(), iterations=2)
    for before, (name, parameter) in zip(start, after.named_parameters(), strict=True):
        assert all(not torch.equal(*pair) for pair in zip(before, parameter, strict=True)), name
    for name in ("actor", "critic"):  # after one update from equality, a target has gone 1 % of the way
        args, nets, model, optimizers = make(script, target_rate=0.01)
        old = weights(getattr(nets, name))
        script.update(make_data(), nets, model, optimizers, args, True, True)
        moved = zip(old, weights(getattr(nets, name)), weights(getattr(nets, f"{name}_target")), strict=True)
        for before, new, target in moved:
            torch.testing.assert_close(target, before + 0.01 * (new - before), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_recorded_individual_rewards_are_never_used(script, discrete):
    """Under macca, team and uniform, training on other recorded individual rewards ends in the same weights."""
    data = make_data(discrete)
    lies = dict(data, individual_rewards=torch.randn_like(data["individual_rewards"]))
    without = {name: value for name, value in data.items() if name != "individual_rewards"}
    for credit in ("macca", "team", "uniform"):
        nets, model = updated(script, data, discrete=discrete, credit=credit)
        for other in (lies, without):
            other_nets, other_model = updated(script, other, discrete=discrete, credit=credit)
            assert same(weights(nets, model), weights(other_nets, other_model))
    nets, _ = updated(script, data, discrete=discrete, credit="truth")
    other_nets, _ = updated(script, lies, discrete=discrete, credit="truth")
    assert not same(weights(nets), weights(other_nets))  # truth does use them, and so does --causal-target truth:
    _, model = updated(script, data, discrete=discrete, causal_target="truth")
    _, other_model = updated(script, lies, discrete=discrete, causal_target="truth")
    assert not same(weights(model), weights(other_model))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_agents_learn_independently(script, discrete):
    """Other observations, actions and rewards of the second agent must leave the first one's networks bit-identical."""
    data = make_data(discrete)
    other = {name: value.clone() for name, value in data.items()}
    for name in ("observations", "next_observations", "individual_rewards"):
        other[name][:, 1] = 1000 * torch.randn_like(other[name][:, 1])  # gradients of a wholly different size
    for name in ("actions", "next_actions"):
        other[name][:, 1] = other[name][:, 1].flip(0) if discrete else -other[name][:, 1]
    if discrete:
        other["action_masks"][:, 1] = other["next_action_masks"][:, 1] = True
    nets, _ = updated(script, data, discrete=discrete, credit="truth", causal=False)
    other_nets, _ = updated(script, other, discrete=discrete, credit="truth", causal=False)
    for (name, one), two in zip(nets.named_parameters(), other_nets.parameters(), strict=True):
        assert torch.equal(one[0::N], two[0::N]), name  # agent 0: the first actor, the first critic of each twin
        if "weight" in name:  # Adam's first steps of a bias depend on the gradient's sign only
            assert not torch.equal(one[1::N], two[1::N]), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_recorded_state_is_used(script):
    """Where a dataset brings a joint state, the causal model must see that and not the observations."""
    data = make_data()
    action = data["actions"]
    state, joint = script.causal_inputs(data, 2)
    assert torch.equal(state, data["observations"].flatten(1)) and torch.equal(joint, action)
    states = torch.randn(64, 7)
    assert torch.equal(script.causal_inputs({**data, "states": states}, 2)[0], states)
    discrete = make_data(True)
    state, joint = script.causal_inputs(discrete, 5)
    assert joint.shape == (64, 2, 5) and joint.dtype == torch.float32
    for row in range(64):
        for agent in range(2):
            expected = [float(choice == discrete["actions"][row, agent]) for choice in range(5)]
            assert joint[row, agent].tolist() == expected


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("stored", ["next_observations", "final_observations"])
@pytest.mark.parametrize("last_action", [False, True])
def test_what_follows_a_row(script, discrete, stored, last_action, tmp_path):
    """Next observations, masks and actions are of the same episode, however the file stores them; so is what was done.

    Each agent sees its last discrete action as one-hot: before an episode's first step nothing, then the row before's,
    and in the next observation the row's own.
    """
    transitions = 40
    arrays = toy.record(toy.Matching(discrete), transitions)
    ends = arrays["timeouts"].copy()
    arrays["terminals"][4::10], arrays["timeouts"][4::10] = True, False  # every other episode ends by a terminal
    changes = {"terminals": arrays["terminals"], "timeouts": arrays["timeouts"], "drop": []}
    if stored == "final_observations":
        changes |= {"final_observations": arrays["next_observations"][ends], "drop": ["next_observations"]}
    path = toy.write(tmp_path / "data.npz", discrete, transitions, **changes)
    args = script.Args(env=f"toy:matching{'_discrete' if discrete else ''}", cuda=False, last_action=last_action)
    data, metadata = script.load_dataset(path, args, toy.Matching(discrete))
    assert metadata["quality"] == "random"
    if discrete and last_action:
        before, after = (np.zeros((transitions, N, 5), np.float32) for _ in range(2))
        for row in range(transitions):
            for agent in range(N):
                after[row, agent, arrays["actions"][row, agent]] = 1
                if row > 0 and not ends[row - 1]:
                    before[row, agent, arrays["actions"][row - 1, agent]] = 1
        assert not before[::5].any() and before.any(2).sum() == N * transitions * 4 / 5  # episodes of 5 steps
        for name, done in (("observations", before), ("next_observations", after)):
            arrays[name] = np.concatenate([arrays[name], done], axis=2)
    assert data["alive"].all() and data["next_alive"].all()
    for name, array in arrays.items():
        assert torch.equal(data[name], torch.from_numpy(array)), name  # nothing is lost, reordered or rounded
        assert data[name].dtype == torch.from_numpy(array).dtype
    if script.__name__ == "macca_icq":
        for row in range(transitions):
            inside = not arrays["terminals"][row] and not arrays["timeouts"][row] and row + 1 < transitions
            assert data["has_next_action"][row] == inside
            if inside:
                assert data["next_actions"][row].tolist() == arrays["actions"][row + 1].tolist()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("recorded", [False, True])
def test_who_is_alive(script, recorded, tmp_path):
    """The dead are those that can do one thing only, whether or not the file says what could be done next."""
    arrays = toy.record(toy.Matching(True), 40)
    for row in range(40):  # the second agent dies in the third step of every episode, the first in the last one's last
        for agent, last in ((0, 39), (1, row // 5 * 5 + 2)):
            if row > last:
                arrays["actions"][row, agent], arrays["action_masks"][row, agent] = 0, np.arange(5) == 0
            if row >= last:
                arrays["next_action_masks"][row, agent] = np.arange(5) == 0
    arrays["terminals"], arrays["timeouts"] = arrays["timeouts"], arrays["terminals"]
    path = toy.write(tmp_path / "data.npz", True, 40, **arrays, drop=[] if recorded else ["next_action_masks"])
    data, _ = script.load_dataset(path, script.Args(env="toy:matching_discrete", cuda=False), toy.Matching(True))
    assert data["alive"].dtype == data["next_alive"].dtype == torch.bool
    for row in range(40):
        assert data["alive"][row].tolist() == [True, row % 5 <= 2]
        if recorded or row % 5 < 4:  # after a terminal nothing is needed, and the next row is another episode's
            assert data["next_alive"][row].tolist() == [row < 39, row % 5 < 2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_episode_that_the_file_cuts_off(script, tmp_path):
    """Rows of an episode whose end was not recorded: the last one has no next action, and nothing wraps around."""
    path = toy.write(tmp_path / "data.npz", transitions=13)  # episodes of 5
    data, _ = script.load_dataset(path, script.Args(env="toy:matching", cuda=False), toy.Matching())
    assert not data["timeouts"][12] and len(data["rewards"]) == 13
    if script.__name__ == "macca_icq":
        assert data["has_next_action"].tolist() == [row % 5 != 4 and row != 12 for row in range(13)]
    path = toy.write(tmp_path / "discrete.npz", True, transitions=13)
    args = script.Args(env="toy:matching_discrete", cuda=False)
    data, _ = script.load_dataset(path, args, toy.Matching(True))
    assert data["observations"].shape == (13, N, OBS + 5)
    assert data["observations"][..., OBS:].any(2).all(1).tolist() == [row % 5 != 0 for row in range(13)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_minibatches(script):
    """All arrays of a minibatch are of the same rows, drawn with replacement from all of them."""
    data = {"rewards": torch.arange(50.0), "observations": torch.arange(50.0)[:, None, None].expand(-1, 2, 3)}
    batch = script.sample(data, 5000)
    assert batch["observations"].shape == (5000, 2, 3)
    assert (batch["observations"] == batch["rewards"][:, None, None]).all()
    counts = torch.bincount(batch["rewards"].long(), minlength=50)
    assert counts.min() > 50 and counts.max() < 150  # 100 each, standard deviation 10


# ---- what is held out ----


def make_episodes(lengths, unfinished=False):
    """Rows that know their own number and their episode's; every other episode ends by a terminal."""
    episode = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ends = torch.cat([episode[1:] != episode[:-1], torch.tensor([not unfinished])])
    rows = torch.arange(len(episode))
    data = {"terminals": ends & (episode % 2 == 0), "timeouts": ends & (episode % 2 == 1), "episode": episode}
    return data | {"rewards": rows.float(), "observations": rows[:, None, None].expand(-1, 2, 3).float()}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("unfinished", [False, True])
def test_held_out_episodes(script, unfinished):
    """Whole episodes, about a tenth of the rows: a credit measured on what was trained on would flatter."""
    lengths = np.random.default_rng(0).integers(1, 40, 300).tolist()
    data = make_episodes(lengths, unfinished)
    torch.manual_seed(1)
    kept, held = script.hold_out(data)
    drawn = torch.rand(1)
    for name, value in data.items():  # every row is in one of both, whole and in the order that it had
        pairs = zip((kept, held), (kept["rewards"].long(), held["rewards"].long()), strict=True)
        assert all(torch.equal(part[name], value[rows]) for part, rows in pairs), name
    assert sorted(torch.cat([kept["rewards"], held["rewards"]]).tolist()) == data["rewards"].tolist()
    assert kept["rewards"].diff().min() > 0 and held["rewards"].diff().min() > 0
    assert not set(kept["episode"].tolist()) & set(held["episode"].tolist())
    assert 0 <= len(held["rewards"]) - sum(lengths) / 10 < max(lengths)
    episodes = held["episode"].unique().float()
    assert episodes.min() < 100 and episodes.max() > 200  # from all over the dataset, which may be sorted by quality
    # The same ones whatever the seed, and nothing random is used up: the run is that of its seed.
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(script.hold_out(data)[1]["rewards"], held["rewards"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_held_out_of_large_and_single_episodes(script):
    """More than 10,000 rows measure nothing better; what is one episode cannot be split."""
    _, held = script.hold_out(make_episodes([25] * 5000))
    assert len(held["rewards"]) == 10_000
    for unfinished in (False, True):
        data = make_episodes([50], unfinished)
        for part in script.hold_out(data):
            assert part.keys() == data.keys() and all(torch.equal(part[name], data[name]) for name in data)


# ---- credit ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_credit(script):
    """The four answers of --credit, in the team reward's units."""
    data = make_data()
    for credit in ("team", "uniform", "truth", "macca"):
        args, _, model, _ = make(script, credit=credit)
        model.fit_statistics(data["observations"].flatten(1), data["rewards"])
        rewards = script.assign_credit(data, args, model, 2)
        assert rewards.shape == (64, N)
        for row in range(64):
            for agent in range(N):
                team, found = data["rewards"][row].item(), rewards[row, agent].item()
                if credit == "team":
                    assert found == team
                elif credit == "uniform":
                    assert found == pytest.approx(team / N)
                elif credit == "truth":
                    assert found == data["individual_rewards"][row, agent].item()
        if credit == "macca":
            expected = model.assign(data["observations"].flatten(1), data["actions"], data["rewards"])
            torch.testing.assert_close(rewards, expected)
            torch.testing.assert_close(rewards.sum(1), data["rewards"])  # nothing of it is lost
            assert not torch.equal(rewards[:, 0], rewards[:, 1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_dead_earn_nothing(script):
    """Nor do they take anything away: a share is one of the living's, and all the shares are the team reward."""
    data = make_data(True)
    data["alive"] = torch.rand(64, N) < 0.6
    living = [int(alive.sum()) for alive in data["alive"]]
    assert {*living} == {0, 1, 2}
    inputs = script.causal_inputs(data, 5)
    for credit in ("macca", "team", "uniform"):
        args, _, model, _ = make(script, True, credit=credit)
        model.fit_statistics(inputs[0], data["rewards"])
        model.slot_mean.copy_(torch.randn(N + 1))
        rewards = script.assign_credit(data, args, model, 5)
        assert rewards.shape == (64, N)
        for row in range(64):
            team, found = data["rewards"][row].item(), rewards[row].tolist()
            for agent in range(N):
                if not data["alive"][row, agent]:
                    assert found[agent] == 0
                elif credit == "team":
                    assert found[agent] == team
                elif credit == "uniform" or living[row] == 1:
                    assert found[agent] == pytest.approx(team / living[row], abs=1e-5)
            if credit != "team":
                assert sum(found) == pytest.approx(team if living[row] else 0, abs=1e-5)
        if credit == "macca":
            torch.testing.assert_close(rewards, model.assign(*inputs, data["rewards"], data["alive"]))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("shift", [False, True])
def test_rescaled_rewards(script, shift, monkeypatch):
    """Mean and deviation are those of an agent's life; a shift would pay or fine those that live long."""
    torch.manual_seed(2)
    rewards, alive = 3 + torch.randn(64, 4) * torch.tensor([0.02, 1.0, 10.0, 1.0]), torch.rand(64, 4) < 0.7
    alive[:, 0], alive[:, 3] = True, False
    found = script.rescale(rewards, alive, torch.tensor(shift))
    expected = np.zeros((64, 4))
    for agent in range(3):
        rows = np.flatnonzero(alive[:, agent])
        own = rewards[rows, agent].double().numpy()
        scale = own.std(ddof=1) if shift else max(own.std(ddof=1), 0.1 * abs(own.mean()))  # agent 0's is the mean
        expected[rows, agent] = (own - shift * own.mean()) / scale
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    # A cost that is always the same, and an agent with a single row, stay in bounds.
    same = torch.full((64, 2), -3.0)
    once = torch.stack([torch.ones(64), torch.arange(64) == 5], dim=1).bool()
    few = script.rescale(same, once, torch.tensor(shift))
    torch.testing.assert_close(few, torch.zeros(64, 2) if shift else -10 * once.float(), rtol=1e-4, atol=1e-6)
    # What the dead are said to have earned changes nothing; and this is what the critic is told.
    assert torch.equal(script.rescale(rewards + 9 * ~alive, alive, torch.tensor(shift)), found)
    seen, genuine = [], script.critic_loss
    monkeypatch.setattr(
        script, "critic_loss", lambda batch, rewards, *rest: seen.append(rewards) or genuine(batch, rewards, *rest)
    )
    data = make_data(True)
    data["alive"] = alive[:, :N]
    args, nets, model, optimizers = make(script, True, credit="truth")
    nets.shift.fill_(shift)
    script.update(data, nets, model, optimizers, args, True, True)
    expected = script.rescale(data["individual_rewards"], data["alive"], torch.tensor(shift))
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("script", SCRIPTS)
def test_standardized_rewards(script, monkeypatch):
    """Each agent's rewards have mean 0 and deviation 1 over the minibatch; team and uniform are then the same."""
    data, seen = make_data(), []
    genuine = script.critic_loss
    monkeypatch.setattr(
        script, "critic_loss", lambda batch, rewards, *rest: seen.append(rewards) or genuine(batch, rewards, *rest)
    )
    for credit in ("team", "uniform", "truth", "macca"):
        updated(script, data, iterations=1, credit=credit, standardize_rewards=True)
        torch.testing.assert_close(seen[-1].mean(0), torch.zeros(N), atol=1e-5, rtol=0)
        torch.testing.assert_close(seen[-1].std(0), torch.ones(N), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=1e-4)
    expected = (data["individual_rewards"] - data["individual_rewards"].mean(0)) / data["individual_rewards"].std(0)
    torch.testing.assert_close(seen[2], expected, atol=1e-4, rtol=1e-4)
    for credit in ("team", "truth"):
        updated(script, data, iterations=1, credit=credit, standardize_rewards=False)
    torch.testing.assert_close(seen[-2], data["rewards"][:, None].expand(-1, N))
    torch.testing.assert_close(seen[-1], data["individual_rewards"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_credit_comes_before_the_causal_step(script, monkeypatch):
    """Algorithm 1: rewards (line 4) are assigned with the model as it was, then the model is stepped (line 5)."""
    data, seen = make_data(), []
    args, nets, model, optimizers = make(script, standardize_rewards=False)
    expected = model.assign(data["observations"].flatten(1), data["actions"], data["rewards"])
    genuine = script.critic_loss
    monkeypatch.setattr(
        script, "critic_loss", lambda batch, rewards, *rest: seen.append(rewards) or genuine(batch, rewards, *rest)
    )
    script.update(data, nets, model, optimizers, args, True, True)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("transitions", [64, 63])
@pytest.mark.parametrize("target", ["team", "truth"])
def test_the_causal_step_takes_half_of_the_minibatch(script, transitions, target):
    """The first half, rounded up, trains the causal model, by those alive; the policy learns from all of it."""
    data = {name: value[:transitions] for name, value in make_data().items()}
    data["alive"] = torch.rand(transitions, N) < 0.7
    half = {name: value[:32] for name, value in data.items()}
    second = {name: value.clone() for name, value in data.items()}
    for name in ("observations", "rewards", "individual_rewards"):
        second[name][32:] = torch.randn_like(second[name][32:])
    nets, model = updated(script, data, causal_target=target, standardize_rewards=False)
    other_nets, other_model = updated(script, second, causal_target=target, standardize_rewards=False)
    assert same(model.state_dict().values(), other_model.state_dict().values())
    assert not same(weights(nets), weights(other_nets))
    _, _, model_by_hand, optimizers = make(script)
    for iteration in range(3):
        torch.manual_seed(iteration)
        truth = half["individual_rewards"] if target == "truth" else None
        state = half["observations"].flatten(1)
        loss, _ = model_by_hand.loss(state, half["actions"], half["rewards"], truth, half["alive"])
        optimizers["causal"].zero_grad()
        loss.backward()
        optimizers["causal"].step()
    assert same(weights(model), weights(model_by_hand))


@pytest.mark.parametrize("script", SCRIPTS)
def test_measured_credit(script):
    """Table 13's numbers and the skill against the even split, by hand; Eq. 6's masks give the densities."""
    data = make_data()
    data["alive"] = torch.rand(64, N) < 0.7
    args, nets, model, _ = make(script, h=0.5)
    with torch.no_grad():
        model.edge_logits.copy_(torch.randn_like(model.edge_logits) * 3)
        model.reward_network[-1].weight.mul_(20)  # for a credit that is not nearly the even split
    model.fit_statistics(data["observations"].flatten(1), data["rewards"])
    metadata = {"random_return": -6.0, "expert_return": 2.0, "paper_random_return": 0.0, "paper_expert_return": 1.0}
    row = script.measure(toy.Matching(), nets, model, data, metadata, args, 2)
    inputs = data["observations"].flatten(1), data["actions"]
    predicted = model.assign(*inputs, alive=data["alive"]).sum(1).numpy()
    assigned = model.assign(*inputs, data["rewards"], data["alive"]).numpy()
    truth, team, alive = (data[name].numpy() for name in ("individual_rewards", "rewards", "alive"))
    even = team[:, None] * alive / alive.sum(1, keepdims=True).clip(1)
    mse = ((assigned - truth) ** 2).mean()
    assert row["credit_mse"] == pytest.approx(mse, rel=1e-4)
    assert row["credit_mae"] == pytest.approx(np.abs(assigned - truth).mean(), rel=1e-4)
    assert row["credit_skill"] == pytest.approx(1 - mse / ((even - truth) ** 2).mean(), rel=1e-4)
    assert row["team_nmse"] == pytest.approx(((predicted - team) ** 2).mean() / team.var(ddof=1), rel=1e-4)
    slots = torch.sigmoid(model.edge_logits.detach())  # the dynamic part is zero before training
    edges = torch.maximum(slots[:N], slots[N])
    assert row["state_density"] == pytest.approx((edges[:, : N * OBS] >= 0.5).float().mean().item())
    assert row["action_density"] == pytest.approx((edges[:, N * OBS :] >= 0.5).float().mean().item())
    assert row["score"] == pytest.approx(100 * (row["return"] + 6) / 8)
    assert row["score_paper"] == pytest.approx(100 * row["return"])
    # The return is the mean over agents, summed over the episode, of episodes with the seeds that the run names.
    returns = script.evaluate(toy.Matching(), nets.actor, 2, 1000 * args.seed, torch.device("cpu"))["return"]
    by_hand = []
    for episode in range(2):
        env, total = toy.Matching(), 0.0
        observations, _ = env.reset(seed=1000 * args.seed + episode)
        while env.agents:
            joint = torch.tensor(np.array([observations[agent] for agent in toy.AGENTS]))[:, None]  # [N, 1, O]
            actions = nets.actor.act(joint)[:, 0].detach().numpy()
            observations, rewards, *_ = env.step(dict(zip(toy.AGENTS, actions, strict=True)))
            total += (rewards["a"] + rewards["b"]) / 2
        by_hand.append(total)
    np.testing.assert_allclose(returns, by_hand, rtol=1e-5)
    assert row["return"] == pytest.approx(np.mean(by_hand)) and row["return_std"] == pytest.approx(np.std(by_hand))


# ---- evaluation ----


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("memory", [0, 5])
def test_evaluation_remembers_the_last_action(script, memory, monkeypatch):
    """What an actor sees is what it was trained on: its last action, nothing before the first; or no action at all."""
    env, seen, played = toy.Matching(True), [], []
    actor = script.Actor(N, OBS + memory, 5, 16, True)
    genuine, genuine_step = actor.act, env.step

    def act(observations, masks):
        assert observations.shape == (N, 1, OBS + memory) and observations.dtype == torch.float32
        seen.append((env.x.copy(), observations[:, 0].numpy()))
        return genuine(observations, masks)

    monkeypatch.setattr(actor, "act", act)
    monkeypatch.setattr(env, "step", lambda actions: played.append(actions) or genuine_step(actions))
    script.evaluate(env, actor, 3, 0, torch.device("cpu"))
    assert len(seen) == len(played) == 3 * toy.EPISODE_STEPS
    for step, (x, observations) in enumerate(seen):
        for i, agent in enumerate(toy.AGENTS):
            last = np.zeros(memory)
            if memory and step % toy.EPISODE_STEPS:
                last[played[step - 1][agent]] = 1
            np.testing.assert_array_equal(observations[i], np.concatenate([x[i], last]))
    assert len({actions[agent] for actions in played for agent in toy.AGENTS}) > 2


# ---- learning ----

# Returns of an episode of 5 steps, mean over agents. Continuous: random actions -6.7, the mean action (behaviour
# cloning on this data) -3.3, the best 0. Discrete: random actions and behaviour cloning 1.25, the best 5.
MARGIN = {False: -0.5, True: 4.6}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    return {d: toy.write(folder / f"discrete{d}.npz", d, transitions=5000) for d in (False, True)}


@pytest.mark.parametrize("credit", ["truth", "uniform", "macca"])
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_learns_a_tiny_task(script, discrete, credit, datasets, tmp_path, monkeypatch):
    """From random actions to nearly the best policy within a few hundred iterations, through the command line."""
    flags = ["--env", f"toy:matching{'_discrete' if discrete else ''}", "--dataset", datasets[discrete], "--no-cuda"]
    flags += ["--credit", credit, "--learning-rate", 3e-3, "--batch-size", 128, "--gamma", 0.5, "--hidden-dim", 32]
    flags += ["--total-iterations", 600 if credit == "macca" else 300, "--final-episodes", 50]
    flags += ["--beta", 0.1] if script == "macca_icq" else []
    status, _, stderr = toy.run(script, tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    with open(toy.run_folder(tmp_path) / "metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["return"]) > MARGIN[discrete]
    if credit == "macca":  # the uniform split has skill 0, the recorded individual rewards have 1
        assert float(last["credit_skill"]) > 0.8 and float(last["team_nmse"]) < 0.2
