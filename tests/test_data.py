"""The particle tasks against mpe2 and a slow reference, the collector, the shipped dataset and policies."""

import contextlib
import csv
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from pettingzoo.test import parallel_api_test, parallel_seed_test

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import collect_mpe, files, mpe  # noqa: E402

SHIPPED = ROOT / "data" / "datasets" / "mpe" / "simple_spread" / "expert.npz"


def run_collect(*arguments):
    """The command in this process, which saves the seconds that importing torch takes: (exit status, stderr)."""
    status, stderr = 0, io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            collect_mpe.main(tyro.cli(collect_mpe.Args, args=[str(argument) for argument in arguments]))
        except SystemExit as stop:
            status = stop.code
    return status, stderr.getvalue()


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def place(env, agents, landmarks):
    """Puts a world into a known state: positions [3, 2] and [3, 2]."""
    for entity, position in zip(env.world.entities, [*agents, *landmarks], strict=True):
        entity.state.p_pos = np.array(position, dtype=np.float64)


# ---- the particle tasks ----


@pytest.mark.parametrize("prey", ["trained", "random"])
@pytest.mark.parametrize("task", mpe.TASKS)
def test_pettingzoo_api(task, prey, capsys):
    parallel_api_test(mpe.parallel_env(task, prey), num_cycles=60)
    parallel_seed_test(lambda: mpe.parallel_env(task, prey))


def rewards(env):
    """The individual rewards of the world's present state: [N]."""
    return env.task.rewards(env.positions_and_velocities()[0])


def slow_rewards(agents, landmarks):
    """The reward of Cooperative Navigation, one sentence of its definition per line."""
    rewards = []
    for i, agent in enumerate(agents):
        reward = 0.0
        for landmark in landmarks:
            nearest = min(np.hypot(*(other - landmark)) for other in agents)
            reward += min(1 / nearest, 10) if nearest > 0 else 10
        for j, other in enumerate(agents):
            if j != i and np.hypot(*(other - agent)) < 0.3:
                reward -= 5
        rewards.append(reward)
    return rewards


def test_rewards_match_a_slow_reference():
    env, rng = mpe.parallel_env("simple_spread"), np.random.default_rng(0)
    env.reset(seed=0)
    touched = capped = 0
    for scale in np.tile([0.1, 0.3, 1.0], 100):  # crowded, then spread out
        agents, landmarks = rng.uniform(-scale, scale, (3, 2)), rng.uniform(-scale, scale, (3, 2))
        agents[0] = landmarks[0] if rng.random() < 0.1 else agents[0]  # exactly on a landmark
        place(env, agents, landmarks)
        expected = slow_rewards(agents, landmarks)
        np.testing.assert_allclose(rewards(env), expected, rtol=1e-12)
        touched += len(set(expected)) > 1
        capped += any(np.hypot(*(agents[i] - landmarks[j])) < 0.1 for i in range(3) for j in range(3))
    assert touched > 20 and capped > 20  # the cases that this test is about did occur


def test_rewards_by_hand():
    env = mpe.parallel_env("simple_spread")
    env.reset(seed=0)
    place(env, [[0, 0], [0.2, 0], [1, 1]], [[0, 0.05], [1, 1.5], [0.2, -0.25]])
    # nearest distances 0.05 (capped at 10), 0.5 and 0.25; the first two agents touch
    np.testing.assert_allclose(rewards(env), [10 + 2 + 4 - 5, 10 + 2 + 4 - 5, 10 + 2 + 4])


@pytest.mark.parametrize("task", ["simple_spread", "simple_spread_discrete"])
def test_dynamics_are_those_of_mpe2(task):
    from mpe2 import simple_spread_v3

    ours, rng = mpe.parallel_env(task), np.random.default_rng(1)
    theirs = simple_spread_v3.parallel_env(continuous_actions=not ours.task.discrete)
    for episode in range(4):
        ours.reset(seed=episode)
        theirs.reset(seed=episode)
        world = theirs.unwrapped.world
        for mine, other in zip(ours.world.entities, world.entities, strict=True):
            position = 0.3 * mine.state.p_pos if episode % 2 else mine.state.p_pos  # odd episodes start in contact
            mine.state.p_pos, other.state.p_pos = position.copy(), position.copy()
            other.state.p_vel = np.zeros(2)
        for step in range(25):
            if ours.task.discrete:
                actions = {agent: int(rng.integers(5)) for agent in ours.agents}
                theirs_actions = actions
            else:
                actions = {agent: rng.uniform(-1, 1, 2).astype(np.float32) for agent in ours.agents}
                # mpe2's five numbers: nothing, left, right, down, up, each from 0 to 1
                theirs_actions = {
                    agent: np.array([0, max(-x, 0), max(x, 0), max(-y, 0), max(y, 0)], dtype=np.float32)
                    for agent, (x, y) in actions.items()
                }
            obs, _, terminated, truncated, _ = ours.step(actions)
            expected, *_ = theirs.step(theirs_actions)
            for agent in obs:
                np.testing.assert_allclose(obs[agent], expected[agent], atol=1e-6)
                assert obs[agent].dtype == np.float32 and not terminated[agent]
                assert truncated[agent] == (step == 24)
            state = mpe.factored_states(task, np.stack(list(obs.values()))[None])[0][0]
            np.testing.assert_array_equal(ours.state(), state)
            assert ours.state_space.contains(ours.state())
    theirs.close()


def test_sparse_reward_needs_an_agent_of_its_own_for_every_landmark():
    env = mpe.parallel_env("simple_spread_sparse")
    env.reset(seed=0)
    apart = np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
    cases = [
        (apart[[2, 0, 1]], apart, 1),  # any order
        (apart + np.array([0.09, 0]), apart, 1),
        (apart + np.array([0.11, 0]), apart, 0),
        (apart, np.array([[0.0, 0.0], [0.05, 0.0], [0.0, 0.5]]), 0),  # agent 0 alone near two landmarks
    ]
    for agents, landmarks, team_reward in cases:
        place(env, agents, landmarks)
        np.testing.assert_allclose(rewards(env), team_reward / 3)


def test_discrete_moves():
    env = mpe.parallel_env("simple_spread_discrete")
    for move, direction in enumerate([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]):
        env.reset(seed=3)
        place(env, [[0, 0], [2, 2], [-2, -2]], np.zeros((3, 2)))
        obs, *_ = env.step(dict.fromkeys(env.agents, move))
        np.testing.assert_allclose(obs["agent_0"][:2], 0.5 * np.array(direction), atol=1e-6)  # force 5 for 0.1


def test_actions_are_clipped_and_checked():
    env = mpe.parallel_env("simple_spread")
    velocities = []
    for size in (1.0, 7.0):
        env.reset(seed=0)
        obs, *_ = env.step({agent: np.full(2, size) for agent in env.agents})
        velocities.append(obs["agent_0"][:2])
    np.testing.assert_array_equal(*velocities)
    for bad in (np.zeros(3), np.array([np.nan, 0]), np.zeros((2, 1))):
        with pytest.raises(ValueError, match=r"agent_1.*two finite numbers"):
            env.step({"agent_0": np.zeros(2), "agent_1": bad, "agent_2": np.zeros(2)})
    with pytest.raises(ValueError, match="no action for agent_0"):
        env.step({})
    with pytest.raises(ValueError, match="simple_spread, simple_spread_discrete"):
        mpe.parallel_env("simple_spred")


def test_render():
    env = mpe.parallel_env("simple_spread", render_mode="rgb_array")
    env.reset(seed=0)
    place(env, [[1, 1], [-1, -1], [-1, -1]], np.full((3, 2), -1.0))
    image = env.render()
    assert image is not None
    assert image.shape == (400, 400, 3) and image.dtype == np.uint8
    top_right, top_left = image[67, 333], image[67, 67]  # x = y = 1 is drawn at the top right
    assert top_right[2] > top_right[0] and (top_left == 255).all()


# ---- the batched worlds ----


def mpe2_scenario(name):
    """mpe2's own scenario of a task: (scenario, its world), without the leader that our WORLD does not have."""
    if name.startswith("simple_spread"):
        from mpe2.simple_spread.simple_spread import Scenario

        scenario = Scenario()
        return scenario, scenario.make_world(3)
    if name.startswith("simple_tag"):
        from mpe2.simple_tag.simple_tag import Scenario

        scenario = Scenario()
        return scenario, scenario.make_world(1, 3, 2)
    from mpe2.simple_world_comm.simple_world_comm import Scenario

    scenario = Scenario()
    world = scenario.make_world(*((1, 3) if name.endswith("3v1") else (2, 4)))
    for agent in world.agents:
        agent.leader, agent.silent = False, True
    return scenario, world


def slow_tag_rewards(task, positions):
    """The rewards of Predator-Prey and WORLD, one sentence of their definition per line: predators', then prey's own
    part for contacts."""
    n, k = task.num_agents, len(task.accel)
    own = []
    for predator in range(n):
        apart = [np.hypot(*(positions[predator] - positions[prey])) for prey in range(n, k)]
        contacts = sum(d < task.sizes[predator] + task.sizes[n] for d in apart)
        own.append(task.contact_reward * contacts - 0.1 * min(apart))
    return own if task.local else [sum(own)] * n


@pytest.mark.parametrize("name", mpe.TASKS)
def test_batched_worlds_are_those_of_mpe2(name):
    """2,000 random states of every task, crowded and spread out, at rest and at full speed: one step of each in mpe2's
    World, and what its scenario lets agents and prey observe there; rewards against a slow reference."""
    number, rng = 2000, np.random.default_rng(3)
    env = mpe.BatchedEnv(name, number, prey="random")
    task = env.task
    env.reset(seed=1)
    env.pos *= rng.choice([0.1, 0.3, 1.0], (number, 1, 1))
    env.vel = rng.uniform(-1, 1, env.vel.shape) * rng.choice([0.0, 1.0, 3.0], (number, 1, 1))
    pos, vel, fled = env.pos.copy(), env.vel.copy(), rng.uniform(-1, 1, (number, task.num_prey, 2))
    env.prey = lambda obs: fled
    if task.discrete:
        actions = rng.integers(5, size=(number, 3))
        forces = mpe.DISCRETE_FORCES[actions]
    else:
        actions = forces = rng.uniform(-1, 1, (number, task.num_agents, 2))
    obs, rewards = env.step(actions)
    forces = np.concatenate([forces, fled], axis=1) * task.accel[:, None]

    scenario, world = mpe2_scenario(name)
    scenario.reset_world(world, rng)
    contacts = hidden = limited = 0
    for e in range(number):
        for i, entity in enumerate(world.entities):
            entity.state.p_pos = pos[e, i].copy()
        for i, agent in enumerate(world.agents):
            agent.state.p_vel, agent.action.u, agent.action.c = vel[e, i].copy(), forces[e, i], np.zeros(world.dim_c)
        world.step()
        np.testing.assert_allclose(env.pos[e], [entity.state.p_pos for entity in world.entities], rtol=0, atol=1e-12)
        np.testing.assert_allclose(env.vel[e], [a.state.p_vel for a in world.agents], rtol=1e-10, atol=1e-12)
        for i, agent in enumerate(world.agents):
            expected = np.asarray(scenario.observation(agent, world), np.float32)
            if i < task.num_agents:
                expected = expected[: task.obs_dim]  # WORLD's communication stands last
                np.testing.assert_allclose(obs[e, i], expected, rtol=1e-6, atol=1e-12)
            else:
                prey_obs = task.prey_observations(env.pos[e], env.vel[e])[i - task.num_agents]
                np.testing.assert_allclose(prey_obs, expected, rtol=1e-6, atol=1e-12)
                mine = task.prey_rewards(env.pos[e])[i - task.num_agents]
                np.testing.assert_allclose(mine, scenario.reward(agent, world), rtol=1e-9, atol=1e-12)
                hidden += (expected[-10:] == 0).sum()
        if task.num_prey:
            expected = slow_tag_rewards(task, env.pos[e])
            contacts += max(expected) > 0
            limited += np.hypot(*env.vel[e].T).max() > 0.999
        elif name != "simple_spread_sparse":
            expected = slow_rewards(env.pos[e, :3], env.pos[e, 3:])
            contacts += len(set(expected)) > 1
        else:
            continue
        np.testing.assert_allclose(rewards[e], expected, rtol=1e-9, atol=1e-12)
    if name != "simple_spread_sparse":  # the cases that this test is about did occur
        assert contacts > 100 and (limited > 100 or not task.num_prey)
    assert hidden > 100 or "world" not in name


@pytest.mark.parametrize("task", ["simple_tag", "simple_world", "simple_tag_local", "simple_world_local"])
def test_both_ways_of_playing_are_the_same_task(task):
    """The same start, the same actions, the shipped prey: 25 steps of ParticleEnv and of BatchedEnv."""
    batched = mpe.BatchedEnv(task, 3)
    seen = [batched.reset(seed=7)]
    starts = batched.pos.copy()
    actions = np.random.default_rng(1).uniform(-1, 1, (25, 3, batched.task.num_agents, 2))
    earned = []
    for step in range(25):
        obs, rewards = batched.step(actions[step])
        seen.append(obs)
        earned.append(rewards)
    assert np.abs(np.diff(earned, axis=0)).max() > 0
    for world in range(3):
        env = mpe.parallel_env(task)
        env.reset(seed=0)
        for entity, position in zip(env.world.entities, starts[world], strict=True):
            entity.state.p_pos = position.copy()
        for step in range(25):
            obs, rewards, *_ = env.step(dict(zip(env.agents, actions[step, world], strict=True)))
            np.testing.assert_allclose(np.stack(list(obs.values())), seen[step + 1][world], atol=1e-4)
            np.testing.assert_allclose(list(rewards.values()), earned[step][world], atol=1e-4)


def test_local_rewards_are_parts_of_the_original():
    """Summed over the predators they are what each of them gets in the original."""
    for task in ("simple_tag", "simple_world"):
        local, original = mpe.BatchedEnv(f"{task}_local", 500, "random"), mpe.BatchedEnv(task, 500, "random")
        for env in (local, original):
            env.reset(seed=2)
            env.pos *= 0.3
        apart = local.task.rewards(local.pos)
        np.testing.assert_allclose(apart.sum(1), original.task.rewards(original.pos)[:, 0])
        assert (apart.std(1) > 1).mean() > 0.05


def test_which_prey(tmp_path):
    """Trained prey is another than random prey and the same every time; what cannot be loaded is said."""
    paths = {}
    for name, prey in (("trained", "trained"), ("again", "trained"), ("random", "random"), ("still", np.zeros_like)):
        prey = (lambda obs: np.zeros((*obs.shape[:-1], 2))) if callable(prey) else prey
        env = mpe.BatchedEnv("simple_tag", 20, prey)
        env.reset(seed=4)
        for _ in range(10):
            env.step(np.zeros((20, 3, 2)))
        paths[name] = env.pos[:, 3]
    np.testing.assert_array_equal(paths["trained"], paths["again"])
    others = [paths[name] for name in ("trained", "random", "still")]
    assert all(np.abs(others[i] - others[i - 1]).mean() > 0.05 for i in range(3))
    with pytest.raises(ValueError, match="expected 'trained' or 'random'"):
        mpe.parallel_env("simple_tag", prey="tame")
    with pytest.raises(ValueError, match=r"are missing; train them: data/collect_mpe.py --env \S+ --train"):
        mpe.load_prey(tmp_path / "prey.npz")
    (tmp_path / "prey.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is not a policy"):
        mpe.load_prey(tmp_path / "prey.npz")


# ---- the factored state, and who caused the reward ----


@pytest.mark.parametrize("name", mpe.TASKS)
def test_factored_states_are_those_of_the_world(name):
    """Against the true positions and velocities; the prey that nobody sees reads as zeros, in WORLD only."""
    rng = np.random.default_rng(5)
    env = mpe.BatchedEnv(name, 2000, prey="random")
    env.reset(seed=3)
    env.pos *= rng.choice([0.1, 0.5, 1.0], (2000, 1, 1))
    env.vel = rng.uniform(-1, 1, env.vel.shape)
    n, movers = env.task.num_agents, len(env.task.accel)
    states, owner = mpe.factored_states(name, env.task.observations(env.pos, env.vel))
    assert states.dtype == np.float32 and states.shape == (2000, len(owner))
    assert owner == [*np.repeat(range(n), 4), *[-1] * (len(owner) - 4 * n)]
    expected = [part for i in range(n) for part in (env.vel[:, i], env.pos[:, i])]
    expected.append(env.pos[:, movers:].reshape(2000, -1))
    hidden = 0
    for prey in range(n, movers):
        alone = np.zeros(2000, bool)
        if "world" in name:  # the forests are the last two
            reach = env.task.sizes[:movers, None] + env.task.sizes[-2:]
            inside = np.hypot(*np.moveaxis(env.pos[:, :movers, None] - env.pos[:, None, -2:], -1, 0)) < reach
            together = (inside[:, :n] & inside[:, prey, None]).any(axis=(1, 2))
            alone = ~together & (inside[:, :n].any(axis=2).all(axis=1) | inside[:, prey].any(axis=1))
        expected += [np.where(alone[:, None], 0, x[:, prey]) for x in (env.pos, env.vel)]
        expected += [~alone[:, None]] if "world" in name else []
        hidden += alone.sum()
    np.testing.assert_allclose(states, np.concatenate(expected, axis=1), atol=1e-6)
    assert hidden > 50 or "world" not in name


def slow_shapley(name, positions, reward, references):
    """The definition for one row: what each agent adds when it joins, mean over all orders of joining."""
    task = mpe.make_task(name)

    def value(coalition):
        total = 0.0
        for reference in references:
            world = positions.copy()
            for agent in set(range(task.num_agents)) - set(coalition):
                world[agent] = reference[agent]
            total += task.rewards(world).sum()
        return total / len(references)

    orders = [*itertools.permutations(range(task.num_agents))]
    shares = np.zeros(task.num_agents)
    for order in orders:
        for place, agent in enumerate(order):
            shares[agent] += (value(order[: place + 1]) - value(order[:place])) / len(orders)
    return shares + (reward - shares.sum()) / task.num_agents


def worlds(name, number=600, scale=0.5):
    """(task, positions [number, M, 2], team rewards [number]) of random worlds, some of them crowded."""
    env = mpe.BatchedEnv(name, number, prey="random")
    env.reset(seed=6)
    env.pos *= scale
    return env.task, env.pos, env.task.rewards(env.pos).sum(axis=-1)


@pytest.mark.parametrize("name", mpe.TASKS)
def test_shapley_rewards_are_those_of_the_definition(name):
    task, positions, rewards = worlds(name, scale=0.1 if "sparse" in name else 0.5)
    references = positions[-7:, : task.num_agents]
    shares = mpe.shapley_rewards(name, positions, rewards, references)
    assert shares.shape == (600, task.num_agents) and shares.dtype == np.float32
    np.testing.assert_allclose(shares.sum(axis=1), rewards, rtol=1e-5, atol=1e-4)
    for row in range(4):
        expected = slow_shapley(name, positions[row], rewards[row], references)
        np.testing.assert_allclose(shares[row], expected, rtol=1e-4, atol=1e-4)
    assert (shares.std(axis=1) > 0.01).mean() > 0.3
    # What nobody caused is shared alike, also what comes on top of the task's reward.
    more = mpe.shapley_rewards(name, positions, rewards + 3, references)
    np.testing.assert_allclose(more, shares + 3 / task.num_agents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["simple_tag_local", "simple_world_local"])
def test_shapley_rewards_of_own_parts_are_these_parts(name):
    """Where every agent's part depends on its own position only, it gets that part, minus what it would have been with
    the references' positions, plus the same for all."""
    task, positions, rewards = worlds(name)
    n = task.num_agents
    references = positions[:5, :n]
    shares = mpe.shapley_rewards(name, positions, rewards, references)
    elsewhere = np.repeat(positions[:, None], 5, axis=1)
    elsewhere[:, :, :n] = references
    gained = task.rewards(positions) - task.rewards(elsewhere).mean(axis=1)
    for values in (shares, gained):
        values -= values.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, gained, atol=1e-4)


def test_shapley_rewards_by_hand():
    """An agent that is where the references have it caused nothing; agents in the same place and case get the same."""
    task, positions, _ = worlds("simple_spread", 50)
    references = np.tile([[5.0, 5], [6, 6], [5, 5]], (4, 1, 1))
    positions[:, 1] = references[0, 1]
    positions[:, 2] = positions[:, 0]
    rewards = task.rewards(positions).sum(axis=1)
    shares = mpe.shapley_rewards("simple_spread", positions, rewards, references)
    away = positions.copy()
    away[:, :3] = references[0]
    left = task.rewards(away).sum(axis=1)  # nobody caused it
    np.testing.assert_allclose(shares[:, 1], left / 3, rtol=1e-3)
    np.testing.assert_allclose(shares[:, 0], shares[:, 2], rtol=1e-3)
    assert (shares[:, 0] - shares[:, 1] > 0.1).mean() > 0.3


# ---- the collector ----


def check_file(data, env_name):
    """What data/README.md promises of a file."""
    transitions, num_agents, _ = data["observations"].shape
    ends = data["terminals"] | data["timeouts"]
    assert set(np.flatnonzero(ends) % 25) == {24} and ends.sum() * 25 == transitions and not data["terminals"].any()
    assert data["final_observations"].shape == (ends.sum(), *data["observations"].shape[1:])
    for key in ("observations", "final_observations", "rewards"):
        assert data[key].dtype == np.float32 and np.isfinite(data[key]).all()
    for key in ("rewards", "terminals", "timeouts"):
        assert data[key].shape == (transitions,)
    if "individual_rewards" in data:
        assert data["individual_rewards"].shape == (transitions, num_agents)
        np.testing.assert_allclose(data["rewards"], data["individual_rewards"].sum(1), rtol=1e-5, atol=1e-4)
    assert data["shapley_rewards"].shape == (transitions, num_agents) and data["shapley_rewards"].dtype == np.float32
    np.testing.assert_allclose(data["rewards"], data["shapley_rewards"].sum(1), rtol=1e-5, atol=1e-4)
    metadata = json.loads(str(data["metadata"]))
    states, owner = mpe.factored_states(env_name.removeprefix("mpe/"), data["observations"])
    np.testing.assert_array_equal(data["states"], states)
    assert metadata["state_owner"] == owner and "positions" not in data
    assert metadata["schema_version"] == "1" and metadata["env"] == env_name
    assert metadata["transitions"] == transitions and metadata["episodes"] == ends.sum()
    per_episode = data["rewards"].reshape(-1, 25).sum(1) / num_agents
    assert metadata["episode_return_mean"] == pytest.approx(per_episode.mean(), rel=1e-5)
    # The next observation follows from the physics: position + 0.1 * velocity, in and at the end of an episode.
    following = collect_mpe.next_observations(data)
    moved = data["observations"][:, :, 2:4] + 0.1 * data["observations"][:, :, 0:2]
    np.testing.assert_allclose(following[:, :, 2:4], moved, atol=1e-5)
    return metadata


@pytest.mark.parametrize(
    "env_name, quality",
    [("mpe/simple_spread", "expert"), ("mpe/simple_spread", "random"), ("mpe/simple_spread_discrete", "random")],
)
def test_recording_is_reproducible(tmp_path, env_name, quality):
    flags = ("--env", env_name, "--quality", quality, "--transitions", 260)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        status, stderr = run_collect(*flags, "--seed", seed, "--output", tmp_path / f"{name}.npz")
        assert status == 0, stderr
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    first, other = load(tmp_path / "a.npz"), load(tmp_path / "c.npz")
    assert not np.array_equal(first["observations"], other["observations"])
    metadata = check_file(first, env_name)
    assert metadata["transitions"] == 250  # whole episodes only
    if "discrete" in env_name:
        assert first["actions"].shape == (250, 3) and first["actions"].dtype == np.int64
        assert "action_masks" not in first  # every move is always allowed
    else:
        assert first["actions"].shape == (250, 3, 2) and first["actions"].dtype == np.float32
        assert np.abs(first["actions"]).max() <= 1
        assert metadata["paper_expert_return"] == 516.526 and metadata["random_return"] < metadata["expert_return"]
    if quality == "random":  # other actors in every episode, and other actions in every step
        assert np.unique(first["actions"].reshape(10, -1), axis=0).shape[0] == 10
        steps = first["actions"].reshape(10, 25, 3, -1)
        assert steps.std(axis=1).min() > 0.3


@pytest.mark.parametrize("env_name", ["mpe/simple_spread_sparse", "mpe/simple_world_local"])
def test_states_and_causes_in_every_task(env_name, tmp_path):
    """Also where only the team is paid, and with prey that nobody sees: states from the file's own observations, and
    Shapley values that compare with rows of the file, so they do not depend on what was cut off."""
    found = []
    for transitions in (750, 760):
        path = tmp_path / f"{transitions}.npz"
        flags = ("--env", env_name, "--quality", "expert", "--transitions", transitions, "--output", path)
        assert run_collect(*flags)[0] == 0
        found.append(load(path))
        assert check_file(found[-1], env_name)["transitions"] == 750
    data = found[0]
    np.testing.assert_array_equal(data["shapley_rewards"], found[1]["shapley_rewards"])
    assert ("individual_rewards" in data) == ("sparse" not in env_name)
    # The sparse reward takes all three agents, so each has caused about a third of it.
    assert data["shapley_rewards"].std(axis=1).max() > 0.1 or "sparse" in env_name


@pytest.mark.parametrize("env_name", ["mpe/simple_tag", "mpe/simple_spread_discrete"])
def test_training_and_medium_replay(tmp_path, env_name):
    """A short training: it learns, it writes what recording needs, and medium-replay repeats its first episodes."""
    short = {"train_episodes": 600, "prey_episodes": 600, "updates_per_round": 20, "eval_episodes": 50}
    args = collect_mpe.Args(env=env_name, train=True, output=tmp_path / "policies", **short)
    collect_mpe.main(args)
    written = {path.name for path in (tmp_path / "policies").iterdir()}
    prey = {"prey.npz"} if "tag" in env_name else set()
    assert written == {"expert.npz", "medium.npz", "references.json", "training.csv"} | prey
    references = json.loads((tmp_path / "policies" / "references.json").read_text())
    assert references["random_return"] != references["expert_return"]
    trained, metadata = collect_mpe.load_policy(tmp_path / "policies" / "medium.npz")
    assert metadata["training"]["train_episodes"] == 600
    best, metadata = collect_mpe.load_policy(tmp_path / "policies" / "expert.npz")
    assert metadata["updates"] == {200: 0, 400: 40, 600: 80}[metadata["training_episodes"]]
    with open(tmp_path / "policies" / "training.csv") as file:
        curve = {int(row["episodes"]): float(row["eval_return"]) for row in csv.DictReader(file)}
    assert list(curve) == [200, 400, 600] and max(curve.values()) == curve[metadata["training_episodes"]]
    assert best.weights[0].shape[0] == trained.weights[0].shape[0] == 3

    env, play = mpe.load_prey(tmp_path / "policies" / "prey.npz") if prey else "trained", {}
    for name, episodes in (("whole", 600), ("again", 600), ("first", 400)):
        play[name] = collect_mpe.train(args, None, episodes, env)
    for key, value in play["first"].items():
        rows = 400 if key == "final_observations" else 400 * 25
        assert len(value) == rows
        np.testing.assert_array_equal(play["whole"][key][:rows], value)
        np.testing.assert_array_equal(play["whole"][key], play["again"][key])
    # Learning changes what is played: without updates the later episodes are others.
    idle = collect_mpe.train(collect_mpe.Args(env=env_name, **{**short, "updates_per_round": 0}), None, 600, env)
    np.testing.assert_array_equal(idle["actions"][: 300 * 25], play["whole"]["actions"][: 300 * 25])
    assert (idle["actions"][-100:] != play["whole"]["actions"][-100:]).any()


def test_medium_replay_is_the_training_of_the_shipped_medium_policy(tmp_path):
    status, stderr = run_collect("--quality", "medium-replay", "--transitions", 10_000, "--output", tmp_path / "a.npz")
    assert status == 0, stderr
    replay = load(tmp_path / "a.npz")
    assert check_file(replay, "mpe/simple_spread")["transitions"] == 10_000
    again = collect_mpe.train(collect_mpe.Args(), None, 400)
    np.testing.assert_array_equal(again["observations"], replay["observations"])


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np.lib.format, "write_array", broken)
    with pytest.raises(KeyboardInterrupt):
        files.save(tmp_path / "x.npz", {"a": np.zeros(3)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--env", "mpe/simple_spred"], "simple_spread_discrete"),
        (["--env", "smac/3m"], "expected mpe/"),
        (["--quality", "random", "--transitions", "0"], "--transitions is 0"),
        (["--quality", "random", "--transitions", "24"], "less than one episode"),
        (["--noise", "-1"], "--noise is -1"),
        (["--noise", "nan"], "--noise is nan"),
        (["--seed", "-1"], "--seed is -1"),
        (["--quality", "medium-replay", "--transitions", "24"], "less than one episode"),
        (["--all"], "--output names one file, but --all writes many"),
        (["--train", "--train-episodes", "100"], "--train-episodes is 100, expected a number from 400"),
        (["--train", "--batch-size", "0"], "--batch-size is 0"),
        (["--train", "--learning-rate", "inf"], "--learning-rate is inf"),
        (["--quality", "brilliant"], "brilliant"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, flags, sentence):
    output = tmp_path / ("policies" if "--train" in flags else "data.npz")
    status, stderr = run_collect(*flags, "--output", output)
    assert status == 2 and sentence in stderr
    assert not list(tmp_path.iterdir())


def test_existing_files_are_kept(tmp_path):
    path = tmp_path / "data.npz"
    path.write_text("precious")
    status, stderr = run_collect("--quality", "random", "--transitions", 25, "--output", path)
    assert status == 2 and "--overwrite" in stderr and path.read_text() == "precious"
    status, stderr = run_collect("--quality", "random", "--transitions", 25, "--output", tmp_path / "data.txt")
    assert status == 2 and ".npz" in stderr


def test_all_datasets(tmp_path, monkeypatch, capsys):
    """Those that are there are left alone, somebody's own file too, unless --overwrite; the rest is recorded."""
    monkeypatch.setattr(collect_mpe, "ALL", [("mpe/simple_tag", "expert"), ("mpe/simple_spread", "random")])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "policies").symlink_to(ROOT / "data" / "policies")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    folder = tmp_path / "data" / "datasets" / "mpe"
    own, other = folder / "simple_tag" / "expert.npz", folder / "simple_spread" / "random.npz"
    own.parent.mkdir(parents=True)
    own.write_text("precious")
    assert run_collect("--all", "--transitions", 50)[0] == 0
    assert own.read_text() == "precious" and json.loads(str(load(other)["metadata"]))["transitions"] == 50
    before = other.stat().st_mtime_ns
    assert run_collect("--all", "--transitions", 50, "--overwrite")[0] == 0
    assert len(load(own)["rewards"]) == 50 and other.stat().st_mtime_ns == before
    assert run_collect("--all", "--transitions", 75)[0] == 0  # of another size: kept, too
    assert len(load(own)["rewards"]) == len(load(other)["rewards"]) == 50


def test_the_command_itself(tmp_path):
    """From another folder and in a process of its own: the same file, and for a mistake one line and no traceback."""
    flags = ["--quality", "random", "--transitions", "50", "--output"]
    command = [sys.executable, str(ROOT / "data" / "collect_mpe.py"), *flags, "own.npz"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert result.returncode == 0, result.stderr
    assert run_collect(*flags, tmp_path / "here.npz")[0] == 0
    assert (tmp_path / "own.npz").read_bytes() == (tmp_path / "here.npz").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert again.returncode == 2 and again.stderr.startswith("collect_mpe.py: own.npz exists; add --overwrite")
    assert len(again.stderr.splitlines()) == 1


def test_terminated_while_writing(tmp_path):
    """SIGTERM in the middle of a file leaves nothing behind, and an older file as it was."""
    (tmp_path / "data.npz").write_text("precious")
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from data import files
genuine = np.lib.format.write_array
def stop(*args, **kwargs):
    genuine(*args, **kwargs)
    assert len(os.listdir()) == 2  # the temporary file
    os.kill(os.getpid(), signal.SIGTERM)
np.lib.format.write_array = stop
files.run(lambda: files.save(files.Path("data.npz"), {{"a": np.zeros(9)}}, {{}}))
print("not reached")"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (143, "", "")
    assert os.listdir(tmp_path) == ["data.npz"] and (tmp_path / "data.npz").read_text() == "precious"


def test_recording_loads_only_what_it_needs():
    """data/files.py is light, so recording battles loads neither torch nor mpe2."""
    code = "import sys; from data import files; print({'torch', 'mpe2', 'jax', 'tyro'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert (result.stdout, result.stderr) == ("set()\n", "")


# ---- what is shipped ----


def test_shipped_expert_dataset():
    data = load(SHIPPED)
    metadata = check_file(data, "mpe/simple_spread")
    # Who has replaced it by one of full size may keep that.
    assert SHIPPED.stat().st_size <= 20_000_000 or metadata["transitions"] == 1_000_000
    assert np.abs(data["actions"]).max() <= 1
    # Noise costs the recorded policy something; it gains nothing by it.
    assert 0.8 * metadata["expert_return"] < metadata["episode_return_mean"] < 1.02 * metadata["expert_return"]


TRAINED = [path.parent.name for path in sorted((ROOT / "data" / "policies" / "mpe").glob("*/expert.npz"))]


@pytest.mark.parametrize("task", TRAINED)
def test_shipped_policies_play_as_their_references_say(task):
    """On the PettingZoo environment, 40 episodes; the references were measured on the batched one."""
    references = json.loads((ROOT / "data" / "policies" / "mpe" / task / "references.json").read_text())
    env = mpe.parallel_env(task)
    for quality in ("medium", "expert"):
        actor, _ = collect_mpe.load_policy(ROOT / "data" / "policies" / "mpe" / task / f"{quality}.npz")
        act = collect_mpe.act_with(actor, 5 if env.task.discrete else 0, 0, np.random.default_rng(0))
        returns = []
        for episode in range(40):
            obs, _ = env.reset(seed=episode)
            returns.append(0.0)
            while env.agents:
                actions = act(np.stack([obs[agent] for agent in env.agents])[None])[0]
                obs, rewards, *_ = env.step(dict(zip(env.agents, actions, strict=True)))
                returns[-1] += sum(rewards.values()) / len(rewards)
        error = np.std(returns, ddof=1) / 40**0.5
        assert abs(np.mean(returns) - references[f"{quality}_return"]) < 4 * error
        # or the line above would accept anything
        assert error < 0.15 * (references["expert_return"] - references["random_return"])
