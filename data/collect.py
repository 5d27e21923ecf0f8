"""Trains behaviour policies online and records offline datasets with them.

    python data/collect.py --env mpe/simple_spread --quality expert --transitions 1000000    # with the shipped weights
    python data/collect.py --env mpe/simple_spread --quality medium-replay                   # trains up to "medium"
    python data/collect.py --env mpe/simple_spread --train                                   # makes the weights anew

The algorithm is TD3 (Fujimoto et al. 2018, https://arxiv.org/abs/1802.09477) with one actor per agent on its own
observation and two centralised critics on all observations and actions, which predict the mean of the agents' returns
and so need no credit assignment. The four qualities, after D4RL and OMAR (https://arxiv.org/abs/2111.11188):

    random         freshly initialised actors, new ones for every episode
    medium-replay  every episode seen in training until the medium policy was reached
    medium         the first policy whose evaluation reached `--medium-return`
    expert         the best policy of the whole training

The file format is described in data/README.md.
"""

import csv
import json
import os
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python data/collect.py` finds the package `data`
from data import mpe  # noqa: E402

# The constants that the paper's scores are normalised with; ours are measured and stored beside them.
PAPER_RETURNS = {"mpe/simple_spread": {"paper_random_return": 160.042, "paper_expert_return": 516.526}}
TEAM_REWARD_ONLY = ("mpe/simple_spread_sparse",)  # nothing in this reward is an agent's own
MEDIUM_RETURN = {"mpe/simple_spread": 273.0}  # the average of OMAR's medium dataset
LOCKSTEP = 20  # environments that training plays side by side, so that a policy is one batched forward pass


@dataclass
class Args:
    env: str = "mpe/simple_spread"
    """the environment: mpe/ and a task of data/mpe.py"""
    quality: Literal["random", "medium-replay", "medium", "expert"] = "expert"
    """which policies act in the dataset"""
    transitions: int = 1_000_000
    """size of the dataset, rounded down to whole episodes (medium-replay: the most that it may have)"""
    noise: float = 0.1
    """standard deviation of the Gaussian noise on the actions of medium and expert (discrete: share of random moves)"""
    seed: int = 0
    """the same seed, machine and package versions give the same dataset"""
    output: Path | None = None
    """the file to write, by default data/datasets/<env>/<quality>.npz; with --train a folder, data/policies/<env>"""
    overwrite: bool = False
    """replace the file (or, with --train, the policies) if it exists"""
    train: bool = False
    """train the behaviour policies and write data/policies/<env>/ instead of recording a dataset"""

    # Training (used by --train and by medium-replay)
    train_episodes: int = 40_000
    """episodes of training, in rounds of 20"""
    updates_per_round: int = 50
    """gradient updates after every round of 20 episodes"""
    medium_return: float | None = None
    """the evaluation return at which a policy is medium; by default 273 for mpe/simple_spread"""
    batch_size: int = 256
    """transitions per update"""
    learning_rate: float = 1e-3
    """Adam's, falling linearly to a tenth at the end of training"""
    gamma: float = 0.95
    """discount"""
    tau: float = 0.01
    """share of the online networks that the target networks take on in every update"""
    exploration_noise: float = 0.2
    """standard deviation of the Gaussian noise on the actions of the training episodes"""
    eval_interval: int = 1_000
    """training episodes between two evaluations (a fifth of it until the medium policy is found)"""
    eval_episodes: int = 200
    """episodes of an evaluation"""


class StackedMLP(nn.Module):
    """`n` separate networks of three layers in one batched matrix product per layer: [n, B, in] to [n, B, out]."""

    def __init__(self, n: int, inputs: int, outputs: int, hidden: int = 128):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in [(inputs, hidden), (hidden, hidden), (hidden, outputs)]:
            bound = fan_in**-0.5  # torch.nn.Linear's initialisation
            self.weights.append(nn.Parameter(torch.empty(n, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(n, 1, fan_out).uniform_(-bound, bound)))

    def forward(self, x):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = F.relu(x) if i < 2 else x
        return x


# ---- environments ----


def make_envs(name: str, number: int) -> list:
    prefix, _, task = name.partition("/")
    if prefix != "mpe" or task not in mpe.TASKS:
        fail(f"--env {name}: expected mpe/ and a task, one of {', '.join(mpe.TASKS)}.")
    return [mpe.parallel_env(task) for _ in range(number)]


def play(envs: list, act, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One episode in every environment, side by side; `act` maps [E, N, obs_dim] to actions [E, N, ...].

    Returns flat transitions: observations [T, N, obs_dim], actions [T, N, ...], individual_rewards [T, N],
    terminals [T], timeouts [T], for discrete actions action_masks [T, N, moves], and final_observations
    [E, N, obs_dim]; the rows of an episode stand in order.
    """
    agents = envs[0].possible_agents
    discrete = hasattr(envs[0].action_space(agents[0]), "n")
    rows = [[] for _ in envs]  # of tuples (observations, actions, rewards, terminal, timeout, masks)
    started = [env.reset(seed=int(rng.integers(2**31))) for env in envs]
    obs = np.stack([[observations[a] for a in agents] for observations, _ in started])  # [E, N, obs_dim]
    infos = [info for _, info in started]
    while any(env.agents for env in envs):
        actions = act(obs)
        for e, env in enumerate(envs):
            if not env.agents:
                continue
            masks = [infos[e][a]["action_mask"] for a in agents] if discrete else ()
            before = obs[e].copy()
            observations, rewards, terminated, truncated, infos[e] = env.step(
                dict(zip(agents, actions[e], strict=True))
            )
            obs[e] = [observations[a] for a in agents]
            terminal = all(terminated.values())
            timeout = all(truncated.values()) and not terminal
            rows[e].append((before, actions[e], [rewards[a] for a in agents], terminal, timeout, masks))
    columns = [np.array(column) for column in zip(*(row for episode in rows for row in episode), strict=True)]
    data = dict(
        zip(
            ("observations", "actions", "individual_rewards", "terminals", "timeouts", "action_masks"),
            columns,
            strict=True,
        )
    )
    data["action_masks"] = data["action_masks"].astype(bool)
    if not discrete:
        del data["action_masks"]
    return data | {"final_observations": obs}


def add_noise(actions: np.ndarray, noise: float, rng: np.random.Generator, moves: int) -> np.ndarray:
    """Gaussian noise clipped to [-1, 1]; for discrete actions (`moves` > 0), a uniformly random move now and then."""
    if moves:
        chance = rng.random(actions.shape) < noise
        return np.where(chance, rng.integers(moves, size=actions.shape), actions)
    noisy = actions + noise * rng.standard_normal(actions.shape, dtype=np.float32)
    return np.clip(noisy, -1, 1)


def act_with(actor: StackedMLP, moves: int, noise: float, rng: np.random.Generator):
    """A policy: [E, N, obs_dim] to [E, N, act_dim] in [-1, 1], or the best of `moves` moves [E, N]; plus noise."""

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        out = actor(torch.from_numpy(obs).transpose(0, 1)).transpose(0, 1)
        actions = out.argmax(-1).numpy() if moves else torch.tanh(out).numpy()
        return add_noise(actions, noise, rng, moves) if noise > 0 else actions

    return act


def act_random(episodes: int, num_agents: int, obs_dim: int, outputs: int, moves: int):
    """Freshly initialised actors, different ones for every agent of every episode: [E, N, obs_dim] to [E, N, ...]."""
    actor = StackedMLP(episodes * num_agents, obs_dim, outputs)

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        out = actor(torch.from_numpy(obs).reshape(-1, 1, obs_dim)).reshape(episodes, num_agents, outputs)
        return out.argmax(-1).numpy() if moves else torch.tanh(out).numpy()

    return act


def episode_returns(data: dict[str, np.ndarray]) -> np.ndarray:
    """[E]: the sum of the individual rewards over each episode, mean over agents."""
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    starts = np.concatenate([[0], ends[:-1] + 1])
    return np.add.reduceat(data["individual_rewards"].mean(axis=1, dtype=np.float64), starts)


def evaluate(envs: list, make_act, episodes: int, seed: int) -> np.ndarray:
    """Returns [episodes] of a policy; `make_act()` gives the policy of a round of len(envs) episodes."""
    rng, returns = np.random.default_rng(seed), []
    while len(returns) < episodes:
        returns.extend(episode_returns(play(envs, make_act(), rng)))
    return np.array(returns[:episodes])


# ---- training ----


def train(args: Args, folder: Path | None) -> dict[str, np.ndarray]:
    """Trains TD3. With a folder, runs to the end and writes the policies there; without, stops at the medium policy.

    Returns the replay buffer, which holds whole episodes in order: the medium-replay dataset.
    """
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    envs = make_envs(args.env, LOCKSTEP)
    num_agents, obs_dim, act_dim, moves = sizes(envs[0])
    if moves:
        fail(f"--env {args.env} has discrete actions: training needs continuous ones.")
    medium_return = args.medium_return if args.medium_return is not None else MEDIUM_RETURN.get(args.env)
    if medium_return is None:
        fail(f"--env {args.env}: give --medium-return, the return at which its policy counts as medium.")

    actor, actor_target = (StackedMLP(num_agents, obs_dim, act_dim) for _ in range(2))
    critic, critic_target = (StackedMLP(2, num_agents * (obs_dim + act_dim), 1) for _ in range(2))
    actor_target.load_state_dict(actor.state_dict())
    critic_target.load_state_dict(critic.state_dict())
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.learning_rate)

    def q_values(network, obs, actions):  # [B, N, obs_dim], [B, N, act_dim] to [2, B]
        joint = torch.cat([obs, actions], dim=-1).flatten(1)
        return network(joint.expand(2, -1, -1)).squeeze(-1)

    def policy(network, obs):  # [B, N, obs_dim] to [B, N, act_dim]
        return torch.tanh(network(obs.transpose(0, 1)).transpose(0, 1))

    buffer = {}  # flat transitions, twice as much room whenever it is full: nothing is ever dropped
    filled, updates, best, curve, medium_done = 0, 0, -np.inf, [], False
    progress = tqdm(total=args.train_episodes, unit="episode", desc="training", mininterval=2)
    for episode in range(0, args.train_episodes, LOCKSTEP):
        noise = args.exploration_noise if episode >= 200 else 1.0  # the first episodes are close to random actions
        new = play(envs, act_with(actor, moves, noise, rng), rng)
        new["next_observations"] = next_observations(new)
        rows = len(new["terminals"])
        for key in new.keys() - {"final_observations"}:
            value = torch.from_numpy(new[key].astype(np.float32))
            if key not in buffer or filled + rows > len(buffer[key]):
                old = buffer.get(key, value[:0])
                buffer[key] = torch.empty(2 * (filled + rows), *value.shape[1:])
                buffer[key][:filled] = old[:filled]
            buffer[key][filled : filled + rows] = value
        filled += rows
        progress.update(LOCKSTEP)

        rate = args.learning_rate * (1 - 0.9 * episode / args.train_episodes)
        for group in actor_optimizer.param_groups + critic_optimizer.param_groups:
            group["lr"] = rate
        for _ in range(args.updates_per_round if episode >= 200 else 0):
            batch = torch.from_numpy(rng.integers(filled, size=args.batch_size))
            obs, actions, next_obs = (buffer[k][batch] for k in ("observations", "actions", "next_observations"))
            reward = buffer["individual_rewards"][batch].mean(dim=1) / 10  # [B]; the scale keeps Q values near 10
            not_terminal = 1 - buffer["terminals"][batch]  # [B]; a timeout bootstraps

            with torch.no_grad():
                smoothing = (0.2 * torch.randn_like(actions)).clamp(-0.5, 0.5)
                next_actions = (policy(actor_target, next_obs) + smoothing).clamp(-1, 1)
                next_q = q_values(critic_target, next_obs, next_actions).min(dim=0).values
                target = reward + args.gamma * not_terminal * next_q  # [B]
            critic_loss = F.mse_loss(q_values(critic, obs, actions), target.expand(2, -1))
            critic_optimizer.zero_grad()
            critic_loss.backward()
            critic_optimizer.step()

            updates += 1
            if updates % 2 == 0:  # TD3's delayed policy update, all agents at once through the team's critic
                actor_loss = -q_values(critic, obs, policy(actor, obs))[0].mean()
                actor_optimizer.zero_grad()
                actor_loss.backward()
                actor_optimizer.step()
                with torch.no_grad():
                    for online, target_net in ((actor, actor_target), (critic, critic_target)):
                        for p, p_target in zip(online.parameters(), target_net.parameters(), strict=True):
                            p_target.lerp_(p, args.tau)

        # Returns rise so fast at the beginning that finding the medium policy takes five times as many evaluations.
        interval = args.eval_interval if medium_done else max(args.eval_interval // 5, 1)
        if (episode + LOCKSTEP) // interval > episode // interval:
            returns = evaluate(envs, lambda: act_with(actor, moves, 0, rng), args.eval_episodes, seed=10_000)
            score = float(returns.mean())
            curve.append((episode + LOCKSTEP, filled, updates, round(score, 2)))
            progress.set_postfix(eval_return=f"{score:.1f}", best=f"{max(best, score):.1f}")
            origin = {"env": args.env, "seed": args.seed, "activations": "relu, relu, tanh"}
            origin |= {"training_episodes": episode + LOCKSTEP, "training_transitions": filled, "updates": updates}
            if score >= medium_return and not medium_done:
                medium_done = True
                if folder is None:
                    break
                save_policy(folder / "medium.npz", actor, origin)
            if score > best and folder is not None:
                best = score
                save_policy(folder / "expert.npz", actor, origin)
            if folder is not None:
                with open(folder / "training.csv", "w", newline="") as file:
                    csv.writer(file).writerows([("episodes", "transitions", "updates", "eval_return"), *curve])
    progress.close()
    if not medium_done:
        fail(f"--medium-return {medium_return}: not reached in {args.train_episodes} episodes of training.")
    data = {key: buffer[key][:filled].numpy() for key in ("observations", "actions", "individual_rewards")}
    data |= {key: buffer[key][:filled].numpy().astype(bool) for key in ("terminals", "timeouts")}
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    return data | {"final_observations": buffer["next_observations"].numpy()[ends]}


def sizes(env) -> tuple[int, int, int, int]:
    """(number of agents, obs_dim, outputs of an actor, number of moves or 0 for continuous actions)"""
    agent = env.possible_agents[0]
    moves = int(getattr(env.action_space(agent), "n", 0))
    return (
        len(env.possible_agents),
        env.observation_space(agent).shape[0],
        moves or env.action_space(agent).shape[0],
        moves,
    )


def next_observations(data: dict[str, np.ndarray]) -> np.ndarray:
    """[T, N, obs_dim]: the next row's observation, and after the last row of an episode its final observation."""
    following = np.concatenate([data["observations"][1:], data["observations"][-1:]])
    following[data["terminals"] | data["timeouts"]] = data["final_observations"]
    return following


def measure_references(args: Args, folder: Path) -> None:
    """Evaluates random and trained policies without noise and writes the returns into the policies' metadata."""
    torch.manual_seed(args.seed)
    envs = make_envs(args.env, 100)
    num_agents, obs_dim, outputs, moves = sizes(envs[0])
    rng = np.random.default_rng(args.seed)
    returns = {
        "random": evaluate(envs, lambda: act_random(100, num_agents, obs_dim, outputs, moves), 1000, seed=20_000)
    }
    loaded = {quality: load_policy(folder / f"{quality}.npz") for quality in ("medium", "expert")}
    for quality, (actor, _) in loaded.items():
        returns[quality] = evaluate(envs, lambda a=actor: act_with(a, moves, 0, rng), 1000, seed=20_000)
    references: dict[str, float] = {"reference_episodes": 1000}
    for quality, values in returns.items():
        references[f"{quality}_return"] = round(float(values.mean()), 3)
        references[f"{quality}_return_standard_error"] = round(float(values.std(ddof=1) / len(values) ** 0.5), 3)
        print(f"{quality:>6}: {values.mean():.1f} +- {values.std(ddof=1) / len(values) ** 0.5:.1f} (1000 episodes)")
    for quality, (actor, metadata) in loaded.items():
        save_policy(folder / f"{quality}.npz", actor, metadata | references)


# ---- files ----


def save_policy(path: Path, actor: StackedMLP, metadata: dict) -> None:
    arrays = {f"weight_{i}": p.detach().numpy() for i, p in enumerate(actor.weights)}  # [N, in, out]
    arrays |= {f"bias_{i}": p.detach().numpy() for i, p in enumerate(actor.biases)}  # [N, 1, out]
    save(path, arrays, metadata)


def load_policy(path: Path) -> tuple[StackedMLP, dict]:
    if not path.exists():
        fail(f"{path} is missing: make the behaviour policies with --train, or ask for --quality random.")
    try:
        with np.load(path, allow_pickle=False) as file:
            parameters = [torch.from_numpy(file[f"{kind}_{i}"]) for kind in ("weight", "bias") for i in range(3)]
            metadata = json.loads(str(file["metadata"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        fail(f"{path} is not a policy that --train wrote ({error}): make it anew with --train --overwrite.")
    actor = StackedMLP(len(parameters[0]), parameters[0].shape[1], parameters[2].shape[2])
    with torch.no_grad():
        for p, value in zip([*actor.weights, *actor.biases], parameters, strict=True):
            p.copy_(value)
    return actor, metadata


def save(path: Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """Writes an .npz next to its place and renames it, so that an interrupted run leaves no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
            for key, value in {**arrays, "metadata": np.array(json.dumps(metadata, indent=1))}.items():
                with file.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, value, allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---- recording ----


def record(args: Args) -> tuple[dict[str, np.ndarray], dict]:
    """Plays a random, medium or expert policy; returns flat transitions and what is known about the policy."""
    envs = make_envs(args.env, min(100, args.transitions))
    num_agents, obs_dim, outputs, moves = sizes(envs[0])
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    if args.quality == "random":
        actor, policy_metadata = None, {}
    else:
        actor, policy_metadata = load_policy(ROOT / "data" / "policies" / args.env / f"{args.quality}.npz")

    rounds, rows = [], 0
    with tqdm(total=args.transitions, unit="transition", unit_scale=True, desc="recording", mininterval=1) as progress:
        while rows < args.transitions:
            if actor is None:
                act = act_random(len(envs), num_agents, obs_dim, outputs, moves)
            else:
                act = act_with(actor, moves, args.noise, rng)
            rounds.append(play(envs, act, rng))
            rows += len(rounds[-1]["terminals"])
            progress.update(len(rounds[-1]["terminals"]))
    return {key: np.concatenate([data[key] for data in rounds]) for key in rounds[0]}, policy_metadata


def write_dataset(args: Args, path: Path) -> None:
    if args.quality == "medium-replay":
        data, policy_metadata, noise = train(args, folder=None), {}, args.exploration_noise
    else:
        data, policy_metadata = record(args)
        noise = 0.0 if args.quality == "random" else args.noise
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    episodes = int((ends <= args.transitions).sum())
    if episodes == 0:
        fail(f"--transitions {args.transitions} is less than one episode of {args.env} ({ends[0]} transitions).")
    data = {
        key: value[: episodes if key == "final_observations" else ends[episodes - 1]] for key, value in data.items()
    }
    data["individual_rewards"] = data["individual_rewards"].astype(np.float32)
    data["rewards"] = data["individual_rewards"].sum(axis=1)
    returns = episode_returns(data)
    if args.env in TEAM_REWARD_ONLY:
        del data["individual_rewards"]

    expert = ROOT / "data" / "policies" / args.env / "expert.npz"  # its metadata hold the returns that scores need
    references = load_policy(expert)[1] if expert.exists() else {}
    wanted = ("random_return", "random_return_standard_error", "expert_return", "expert_return_standard_error")
    always, never = ("env", "quality", "transitions", "seed"), ("output", "overwrite")
    flags = [
        f"--{key.replace('_', '-')} {value}"
        for key, value in vars(args).items()
        if key in always or (key not in never and value != getattr(Args, key))
    ]
    metadata = {
        "schema_version": "1",
        "env": args.env,
        "quality": args.quality,
        "seed": args.seed,
        "noise": noise,
        "command": " ".join(["python data/collect.py", *flags]),
        "transitions": len(data["rewards"]),
        "episodes": episodes,
        "episode_return_mean": float(returns.mean()),
        "episode_return_std": float(returns.std()),
        "episode_return_min": float(returns.min()),
        "episode_return_max": float(returns.max()),
        **{key: references[key] for key in wanted if key in references},
        **PAPER_RETURNS.get(args.env, {}),
        "policy": policy_metadata,
        "versions": {package: version(package) for package in ("numpy", "torch", "mpe2")},
    }
    save(path, data, metadata)
    size = path.stat().st_size / 1e6
    print(f"{path}: {len(data['rewards'])} transitions, {episodes} episodes, {size:.1f} MB")
    print(f"return per agent and episode: {returns.mean():.1f}, standard deviation {returns.std():.1f}")


def main(args: Args) -> None:
    torch.set_num_threads(1)  # with more, sums are taken in another order and files differ in their last digits
    make_envs(args.env, 1)
    if args.transitions < 1:
        fail(f"--transitions {args.transitions}: expected a positive number.")
    if args.seed < 0:
        fail(f"--seed {args.seed}: expected 0 or a positive number.")
    for flag in ("noise", "exploration_noise", "updates_per_round"):
        if not 0 <= getattr(args, flag) < np.inf:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected 0 or a positive number.")
    for flag in ("train_episodes", "batch_size", "eval_interval", "eval_episodes", "learning_rate", "tau"):
        if not 0 < getattr(args, flag) < np.inf:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected a positive number.")
    if not 0 <= args.gamma <= 1:
        fail(f"--gamma {args.gamma}: expected a number from 0 to 1.")

    if args.train:
        folder = args.output or ROOT / "data" / "policies" / args.env
        if (folder / "expert.npz").exists() and not args.overwrite:
            fail(f"{folder} has policies already: add --overwrite to replace them, or choose another --output.")
        train(args, folder)
        measure_references(args, folder)
        return
    path = args.output or ROOT / "data" / "datasets" / args.env / f"{args.quality}.npz"
    if path.suffix != ".npz" or path.is_dir():
        fail(f"--output {path}: expected the name of a file that ends in .npz.")
    if path.exists() and not args.overwrite:
        fail(f"{path} exists already: add --overwrite to replace it, or choose another --output.")
    write_dataset(args, path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except OSError as error:
        fail(f"{error.filename or 'file'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        fail("interrupted; nothing was written.")
