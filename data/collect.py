"""Trains behaviour policies online and records offline datasets with them.

    python data/collect.py --env mpe/simple_tag --quality medium      # a million transitions, with the shipped weights
    python data/collect.py --all                                      # every dataset of data/README.md, at full size
    python data/collect.py --env mpe/simple_tag --train --overwrite   # makes the weights anew

The algorithm is TD3 (Fujimoto et al. 2018, https://arxiv.org/abs/1802.09477) with one actor per agent on its own
observation and two centralised critics on all observations and actions, which predict the mean of the agents' returns
and so need no credit assignment; for discrete actions the actors draw from a Gumbel-softmax, as in MADDPG. Where a task
has prey, predators and prey first learn against each other; then the prey is frozen, and the predators begin anew
against it. The four qualities, after D4RL and OMAR (https://arxiv.org/abs/2111.11188):

    random         freshly initialised actors, new ones for every episode
    medium-replay  every episode of such a training, until the medium policy was reached
    medium         the first policy whose evaluation came as far between random and expert as OMAR's medium data did
    expert         the policy of the training that was evaluated best

Worlds are played many at a time (`BatchedEnv` of data/mpe.py). The file format is described in data/README.md.
"""

import copy
import csv
import dataclasses
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

# The constants that the paper's scores are normalised with, random and expert; ours are measured and stored as well.
PAPER_RETURNS = {
    "mpe/simple_spread": (160.042, 516.526),
    "mpe/simple_tag": (-2.569, 90.637),
    "mpe/simple_world": (-8.734, 34.661),
    "mpe/simple_world_3v1": (-8.734, 34.661),
}
TEAM_REWARD_ONLY = ("mpe/simple_spread_sparse",)  # nothing in this reward is an agent's own
# Tasks that differ from another one in their reward alone are played by the other's policies.
POLICIES_OF = {
    "mpe/simple_spread_sparse": "mpe/simple_spread",
    "mpe/simple_tag_local": "mpe/simple_tag",
    "mpe/simple_world_local": "mpe/simple_world",
}
# How far the mean return of OMAR's medium datasets lies on the way from that of its random to that of its expert ones.
MEDIUM_SHARE = {"simple_spread": 0.31, "simple_tag": 0.57, "simple_world": 0.79}
FOUR, TWO = ("random", "medium-replay", "medium", "expert"), ("medium", "expert")
ALL = [(f"mpe/{task}", quality) for task in ("simple_spread", "simple_tag", "simple_world") for quality in FOUR]
ALL += [
    (f"mpe/{task}", quality)
    for task in ("simple_spread_sparse", "simple_spread_discrete", "simple_tag_local", "simple_world_local")
    for quality in TWO
]
LOCKSTEP = 100  # worlds that training plays side by side
EVALUATED = 400  # worlds that are evaluated side by side


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
    all: bool = False
    """record every dataset of data/README.md that is not there; another file in its place stays, unless --overwrite"""
    train: bool = False
    """train the behaviour policies and write data/policies/<env>/ instead of recording a dataset"""

    # Training (used by --train; medium-replay takes the settings with which its medium policy was trained)
    train_episodes: int = 40_000
    """episodes of training, in rounds of 100"""
    prey_episodes: int = 20_000
    """episodes in which predators and prey learn against each other, before"""
    updates_per_round: int = 250
    """gradient updates after every round of 100 episodes"""
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
    eval_interval: int = 200
    """training episodes between two evaluations"""
    eval_episodes: int = 400
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


# ---- playing ----


def make_env(name: str, number: int, prey: str | mpe.PreyPolicy = "trained") -> mpe.BatchedEnv:
    prefix, _, task = name.partition("/")
    if prefix != "mpe" or task not in mpe.TASKS:
        fail(f"--env {name}: expected mpe/ and a task, one of {', '.join(mpe.TASKS)}.")
    try:
        return mpe.BatchedEnv(task, number, prey)
    except ValueError as error:  # no trained prey
        fail(str(error))


def play(env: mpe.BatchedEnv, act, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One episode in every world; `act` maps [E, N, obs_dim] to actions [E, N, ...].

    Returns flat transitions: observations [T, N, obs_dim], actions [T, N, ...], individual_rewards [T, N],
    terminals [T], timeouts [T], for discrete actions action_masks [T, N, moves], and final_observations
    [E, N, obs_dim]; the rows of an episode stand in order.
    """
    steps = []  # of tuples (observations, actions, rewards), each [E, N, ...]
    obs = env.reset(int(rng.integers(2**31)))
    for _ in range(mpe.EPISODE_STEPS):
        actions = act(obs)
        following, rewards = env.step(actions)
        steps.append((obs, actions, rewards))
        obs = following
    columns = [np.stack(column, axis=1) for column in zip(*steps, strict=True)]  # [E, 25, N, ...]
    names = ("observations", "actions", "individual_rewards")
    data = {name: column.reshape(-1, *column.shape[2:]) for name, column in zip(names, columns, strict=True)}
    data["terminals"] = np.zeros(len(data["actions"]), bool)
    data["timeouts"] = np.tile(np.arange(mpe.EPISODE_STEPS) == mpe.EPISODE_STEPS - 1, env.number)
    if env.task.discrete:
        data["action_masks"] = np.ones((*data["actions"].shape, len(mpe.DISCRETE_FORCES)), bool)
    return data | {"final_observations": obs}


def act_with(actor: StackedMLP, moves: int, noise: float, rng: np.random.Generator):
    """A policy: [E, N, obs_dim] to [E, N, act_dim] in [-1, 1], or the best of `moves` moves [E, N]; plus Gaussian
    noise, or a uniformly random move now and then."""

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        out = actor(torch.from_numpy(obs).transpose(0, 1)).transpose(0, 1)
        if moves:
            best = out.argmax(-1).numpy()
            return np.where(rng.random(best.shape) < noise, rng.integers(moves, size=best.shape), best)
        actions = torch.tanh(out).numpy()
        return np.clip(actions + noise * rng.standard_normal(actions.shape, dtype=np.float32), -1, 1)

    return act


def act_random(env: mpe.BatchedEnv):
    """Freshly initialised actors, different ones for every agent of every world: [E, N, obs_dim] to [E, N, ...]."""
    agents, obs_dim, outputs, moves = sizes(env)
    actor = StackedMLP(env.number * agents, obs_dim, outputs)

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        out = actor(torch.from_numpy(obs).reshape(-1, 1, obs_dim)).reshape(env.number, agents, outputs)
        return out.argmax(-1).numpy() if moves else torch.tanh(out).numpy()

    return act


def sizes(env: mpe.BatchedEnv) -> tuple[int, int, int, int]:
    """(number of agents, obs_dim, outputs of an actor, number of moves or 0 for continuous actions)"""
    moves = len(mpe.DISCRETE_FORCES) if env.task.discrete else 0
    return env.task.num_agents, env.task.obs_dim, moves or 2, moves


def episode_returns(data: dict[str, np.ndarray]) -> np.ndarray:
    """[E]: the sum of the individual rewards over each episode, mean over agents."""
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    starts = np.concatenate([[0], ends[:-1] + 1])
    return np.add.reduceat(data["individual_rewards"].mean(axis=1, dtype=np.float64), starts)


def evaluate(env: mpe.BatchedEnv, make_act, episodes: int, seed: int) -> np.ndarray:
    """Returns [episodes] of a policy; `make_act()` gives the policy of a round of `env.number` episodes."""
    rng, returns = np.random.default_rng(seed), []
    while len(returns) < episodes:
        returns.extend(episode_returns(play(env, make_act(), rng)))
    return np.array(returns[:episodes])


# ---- training ----


class Learner:
    """TD3 for one side, predators or prey: an actor for each agent, twin critics of joint observation and action."""

    def __init__(self, agents: int, obs_dim: int, outputs: int, moves: int, args: Args, hidden: int = 128):
        self.args, self.moves, self.updates = args, moves, 0
        self.actor = StackedMLP(agents, obs_dim, outputs, hidden)
        self.critic = StackedMLP(2, agents * (obs_dim + outputs), 1)
        self.actor_target, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.learning_rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.learning_rate, fused=True)

    def q_values(self, critic, obs, actions):  # [B, N, obs_dim], [B, N, outputs] to [2, B]
        joint = torch.cat([obs, actions], dim=-1).flatten(1)
        return critic(joint.expand(2, -1, -1)).squeeze(-1)

    def policy(self, actor, obs):  # [B, N, obs_dim] to [B, N, outputs]
        out = actor(obs.transpose(0, 1)).transpose(0, 1)
        return F.gumbel_softmax(out, hard=True) if self.moves else torch.tanh(out)

    def update(self, replay: "Replay", rng: np.random.Generator, progress: float) -> None:
        """A round of gradient steps; `progress` from 0 to 1 is how much of the training is over."""
        args = self.args
        for group in self.actor_optimizer.param_groups + self.critic_optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - 0.9 * progress)
        for _ in range(args.updates_per_round):
            obs, actions, rewards, next_obs = replay.sample(args.batch_size, rng)
            if self.moves:
                actions = F.one_hot(actions.long(), self.moves).float()
            with torch.no_grad():
                next_actions = self.policy(self.actor_target, next_obs)
                if not self.moves:
                    smoothing = (0.2 * torch.randn_like(actions)).clamp(-0.5, 0.5)
                    next_actions = (next_actions + smoothing).clamp(-1, 1)
                next_q = self.q_values(self.critic_target, next_obs, next_actions).min(dim=0).values
                # Every episode ends by the time limit, so every transition bootstraps. A tenth keeps Q near 10.
                target = rewards.mean(dim=1) / 10 + args.gamma * next_q  # [B]
            critic_loss = F.mse_loss(self.q_values(self.critic, obs, actions), target.expand(2, -1))
            self.critic_optimizer.zero_grad()
            critic_loss.backward()
            self.critic_optimizer.step()

            self.updates += 1
            if self.updates % 2 == 0:  # TD3's delayed policy update, all agents at once through the team's critic
                gradients = torch.autograd.grad(
                    -self.q_values(self.critic, obs, self.policy(self.actor, obs))[0].mean(),
                    list(self.actor.parameters()),
                )
                for parameter, gradient in zip(self.actor.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                self.actor_optimizer.step()
                with torch.no_grad():
                    for online, target in ((self.actor, self.actor_target), (self.critic, self.critic_target)):
                        for p, p_target in zip(online.parameters(), target.parameters(), strict=True):
                            p_target.lerp_(p, args.tau)


class Replay:
    """Every transition of a training, in order; nothing is ever dropped."""

    def __init__(self, capacity: int):
        self.capacity, self.filled, self.columns = capacity, 0, []

    def add(self, *columns: np.ndarray) -> None:
        """Observations [T, N, obs_dim], actions [T, N, ...], rewards [T, N], next observations [T, N, obs_dim]."""
        if not self.columns:
            kinds = [torch.int8 if column.dtype.kind == "i" else torch.float32 for column in columns]
            shapes = [(self.capacity, *column.shape[1:]) for column in columns]
            self.columns = [torch.empty(shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)]
        rows = slice(self.filled, self.filled + len(columns[0]))
        for kept, column in zip(self.columns, columns, strict=True):
            kept[rows] = torch.from_numpy(column)
        self.filled = rows.stop

    def sample(self, size: int, rng: np.random.Generator) -> list[torch.Tensor]:
        rows = torch.from_numpy(rng.integers(self.filled, size=size))
        return [column[rows] for column in self.columns]


def train_prey(args: Args, folder: Path) -> None:
    """Predators and prey learn against each other; writes the last prey to `folder`/prey.npz."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    env = make_env(args.env, LOCKSTEP, prey="random")
    assert isinstance(env.task, mpe.SimpleTag)
    predators = Learner(*sizes(env), args)
    prey = Learner(env.task.num_prey, env.task.prey_obs_dim, 2, 0, args, hidden=64)
    replays = [Replay(args.prey_episodes * mpe.EPISODE_STEPS) for _ in range(2)]
    caught: list[float] = []
    with tqdm(total=args.prey_episodes, unit="episode", desc="training the prey", mininterval=2) as progress:
        for episode in range(0, args.prey_episodes - LOCKSTEP + 1, LOCKSTEP):
            noise = args.exploration_noise if episode >= 500 else 1.0  # the first episodes are close to random actions
            act, flee = (act_with(learner.actor, 0, noise, rng) for learner in (predators, prey))
            obs = env.reset(int(rng.integers(2**31)))
            prey_obs = env.task.prey_observations(env.pos, env.vel)
            for _ in range(mpe.EPISODE_STEPS):
                actions, fled = act(obs), flee(prey_obs)
                env.prey = lambda _, fled=fled: fled
                following, rewards = env.step(actions)
                prey_following = env.task.prey_observations(env.pos, env.vel)
                replays[0].add(obs, actions, rewards, following)
                replays[1].add(prey_obs, fled, env.task.prey_rewards(env.pos), prey_following)
                obs, prey_obs = following, prey_following
                caught.append(float((rewards > 0).mean()))
            if episode >= 500:
                for learner, replay in zip((predators, prey), replays, strict=True):
                    learner.update(replay, rng, episode / args.prey_episodes)
            progress.update(LOCKSTEP)
            progress.set_postfix(caught=f"{np.mean(caught[-500:]):.1%}")
    origin = {"env": args.env, "seed": args.seed, "activations": "relu, relu, tanh", "training": settings(args)}
    save_policy(folder / "prey.npz", prey.actor, origin | {"updates": prey.updates})


def settings(args: Args) -> dict:
    """The arguments that a training depends on."""
    first = [field.name for field in dataclasses.fields(Args)].index("train_episodes")
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(Args)[first:]}


def train(
    args: Args, folder: Path | None, episodes: int, prey: str | mpe.PreyPolicy = "trained"
) -> dict[str, np.ndarray]:
    """Trains TD3 for `episodes` of the `args.train_episodes` that its schedule is made for.

    With a folder, evaluates on the way and writes the medium and the expert policy and the learning curve there.
    Returns the replay buffer as `play` returns transitions; its first episodes are the medium-replay dataset.
    """
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    env, judge = make_env(args.env, LOCKSTEP, prey), make_env(args.env, EVALUATED, prey)
    moves = sizes(env)[3]
    learner, replay = Learner(*sizes(env), args), Replay(episodes * mpe.EPISODE_STEPS)
    snapshots: list[tuple[int, int, float, StackedMLP]] = []  # (episodes, updates, return, actor)
    progress = tqdm(total=episodes, unit="episode", desc="training", mininterval=2)
    for episode in range(0, episodes - LOCKSTEP + 1, LOCKSTEP):
        noise = args.exploration_noise if episode >= 200 else 1.0  # the first episodes are close to random actions
        new = play(env, act_with(learner.actor, moves, noise, rng), rng)
        replay.add(new["observations"], new["actions"], new["individual_rewards"], next_observations(new))
        if episode >= 200:
            learner.update(replay, rng, episode / args.train_episodes)
        progress.update(LOCKSTEP)
        done = episode + LOCKSTEP
        if folder is not None and done // args.eval_interval > episode // args.eval_interval:
            returns = evaluate(judge, lambda: act_with(learner.actor, moves, 0, rng), args.eval_episodes, seed=10_000)
            snapshots.append((done, learner.updates, float(returns.mean()), copy.deepcopy(learner.actor)))
            best = max(score for _, _, score, _ in snapshots)
            progress.set_postfix(eval_return=f"{returns.mean():.1f}", best=f"{best:.1f}")
    progress.close()

    if folder is not None:
        random = evaluate(judge, lambda: act_random(judge), 1000, seed=20_000).mean()
        expert = max(snapshots, key=lambda snapshot: snapshot[2])
        share = next(share for task, share in MEDIUM_SHARE.items() if task in args.env)
        medium = next((s for s in snapshots if s[2] >= random + share * (expert[2] - random)), expert)
        for quality, (done, updates, _, actor) in {"medium": medium, "expert": expert}.items():
            origin = {"env": args.env, "seed": args.seed, "activations": "relu, relu, tanh"}
            origin |= {"training_episodes": done, "training_transitions": done * mpe.EPISODE_STEPS, "updates": updates}
            save_policy(folder / f"{quality}.npz", actor, origin | {"training": settings(args)})
        with open(folder / "training.csv", "w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("episodes", "transitions", "updates", "eval_return"))
            table.writerows((done, done * mpe.EPISODE_STEPS, n, round(score, 2)) for done, n, score, _ in snapshots)

    columns = [column[: replay.filled].numpy() for column in replay.columns]
    actions = columns[1].astype(np.int64) if moves else columns[1]
    timeouts = np.arange(1, replay.filled + 1) % mpe.EPISODE_STEPS == 0
    data = {"observations": columns[0], "actions": actions, "individual_rewards": columns[2]}
    data |= {"terminals": np.zeros(replay.filled, bool), "timeouts": timeouts}
    if moves:
        data["action_masks"] = np.ones((*actions.shape, moves), bool)
    return data | {"final_observations": columns[3][timeouts]}


def next_observations(data: dict[str, np.ndarray]) -> np.ndarray:
    """[T, N, obs_dim]: the next row's observation, and after the last row of an episode its final observation."""
    following = np.concatenate([data["observations"][1:], data["observations"][-1:]])
    following[data["terminals"] | data["timeouts"]] = data["final_observations"]
    return following


def measure_references(args: Args, policies: Path, folder: Path, prey: str | mpe.PreyPolicy) -> None:
    """Evaluates random and trained policies without noise and writes `folder`/references.json: what scores need."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    env = make_env(args.env, EVALUATED, prey)
    moves = sizes(env)[3]
    played = {"random": lambda: act_random(env)}
    for quality in TWO:
        actor, _ = load_policy(policies / f"{quality}.npz")
        played[quality] = lambda actor=actor: act_with(actor, moves, 0, rng)
    references: dict[str, float] = {"reference_episodes": 1000}
    for quality, make_act in played.items():
        values = evaluate(env, make_act, 1000, seed=20_000)
        references[f"{quality}_return"] = round(float(values.mean()), 3)
        references[f"{quality}_return_standard_error"] = round(float(values.std(ddof=1) / len(values) ** 0.5), 3)
        print(f"{quality:>6}: {values.mean():.1f} +- {values.std(ddof=1) / len(values) ** 0.5:.1f} (1000 episodes)")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "references.json").write_text(json.dumps(references, indent=1) + "\n")


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
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
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


def record(args: Args, folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Plays a random, medium or expert policy; returns flat transitions and what is known about the policy."""
    # Every world of a random dataset has actors of its own: 200 of them are enough weights at a time.
    worlds = min(200 if args.quality == "random" else 1000, max(args.transitions // mpe.EPISODE_STEPS, 1))
    env = make_env(args.env, worlds)
    moves = sizes(env)[3]
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    actor, policy_metadata = (None, {}) if args.quality == "random" else load_policy(folder / f"{args.quality}.npz")
    rounds, rows = [], 0
    with tqdm(total=args.transitions, unit="transition", unit_scale=True, desc="recording", mininterval=1) as progress:
        while rows < args.transitions:
            act = act_random(env) if actor is None else act_with(actor, moves, args.noise, rng)
            rounds.append(play(env, act, rng))
            rounds[-1]["individual_rewards"] = rounds[-1]["individual_rewards"].astype(np.float32)
            rows += len(rounds[-1]["terminals"])
            progress.update(len(rounds[-1]["terminals"]))
    return {key: np.concatenate([data[key] for data in rounds]) for key in rounds[0]}, policy_metadata


def command(args: Args) -> str:
    """What makes a dataset again."""
    always, never = ("env", "quality", "transitions", "seed"), ("output", "overwrite", "all")
    flags = [
        f"--{key.replace('_', '-')} {value}"
        for key, value in vars(args).items()
        if key in always or (key not in never and value != getattr(Args, key))
    ]
    return " ".join(["python data/collect.py", *flags])


def write_dataset(args: Args, path: Path) -> None:
    """Records what `args` ask for and writes it to `path`."""
    if args.transitions < mpe.EPISODE_STEPS:
        fail(
            f"--transitions {args.transitions} is less than one episode of {args.env}, {mpe.EPISODE_STEPS} transitions."
        )
    folder = ROOT / "data" / "policies" / POLICIES_OF.get(args.env, args.env)
    if args.quality == "medium-replay":
        _, policy_metadata = load_policy(folder / "medium.npz")
        again = dataclasses.replace(args, **policy_metadata["training"])
        episodes = min(policy_metadata["training_episodes"], max(args.transitions // mpe.EPISODE_STEPS, LOCKSTEP))
        data, noise = train(again, None, episodes), again.exploration_noise
    else:
        data, policy_metadata = record(args, folder)
        noise = 0.0 if args.quality == "random" else args.noise
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    episodes = int((ends <= args.transitions).sum())
    data = {
        key: value[: episodes if key == "final_observations" else ends[episodes - 1]] for key, value in data.items()
    }
    data["rewards"] = data["individual_rewards"].sum(axis=1)
    returns = episode_returns(data)
    if args.env in TEAM_REWARD_ONLY:
        del data["individual_rewards"]

    measured = ROOT / "data" / "policies" / args.env / "references.json"  # the returns that scores need
    references = json.loads(measured.read_text()) if measured.exists() else {}
    wanted = ("random_return", "random_return_standard_error", "expert_return", "expert_return_standard_error")
    paper = PAPER_RETURNS.get(args.env)
    metadata = {
        "schema_version": "1",
        "env": args.env,
        "quality": args.quality,
        "seed": args.seed,
        "noise": noise,
        "command": command(args),
        "transitions": len(data["rewards"]),
        "episodes": episodes,
        "episode_return_mean": float(returns.mean()),
        "episode_return_std": float(returns.std()),
        "episode_return_min": float(returns.min()),
        "episode_return_max": float(returns.max()),
        **{key: references[key] for key in wanted if key in references},
        **({"paper_random_return": paper[0], "paper_expert_return": paper[1]} if paper else {}),
        "policy": policy_metadata,
        "versions": {package: version(package) for package in ("numpy", "torch", "mpe2")},
    }
    save(path, data, metadata)
    size = path.stat().st_size / 1e6
    tqdm.write(f"{path}: {len(data['rewards'])} transitions, {episodes} episodes, {size:.1f} MB")
    tqdm.write(f"return per agent and episode: {returns.mean():.1f}, standard deviation {returns.std():.1f}")


def default_path(args: Args) -> Path:
    return ROOT / "data" / "datasets" / args.env / f"{args.quality}.npz"


def made_by(path: Path) -> str:
    """The command that a dataset says it was made with."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["metadata"]))["command"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return ""


def main(args: Args) -> None:
    torch.set_num_threads(1)  # with more, sums are taken in another order and files differ in their last digits
    if args.env.removeprefix("mpe/") not in mpe.TASKS or not args.env.startswith("mpe/"):
        fail(f"--env {args.env}: expected mpe/ and a task, one of {', '.join(mpe.TASKS)}.")
    if args.transitions < 1:
        fail(f"--transitions {args.transitions}: expected a positive number.")
    if args.seed < 0:
        fail(f"--seed {args.seed}: expected 0 or a positive number.")
    for flag in ("noise", "exploration_noise", "updates_per_round"):
        if not 0 <= getattr(args, flag) < np.inf:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected 0 or a positive number.")
    for flag in ("batch_size", "eval_interval", "eval_episodes", "learning_rate", "tau"):
        if not 0 < getattr(args, flag) < np.inf:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected a positive number.")
    for flag in ("train_episodes", "prey_episodes"):
        if getattr(args, flag) < 4 * LOCKSTEP:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {4 * LOCKSTEP} or more.")
    if not 0 <= args.gamma <= 1:
        fail(f"--gamma {args.gamma}: expected a number from 0 to 1.")

    if args.all:
        for env, quality in tqdm(ALL, desc="datasets", unit="dataset"):
            one = dataclasses.replace(args, all=False, env=env, quality=quality)
            path = default_path(one)
            if path.exists() and made_by(path) == command(one):
                continue
            if path.exists() and not args.overwrite:  # the small one that is shipped, or somebody's own
                tqdm.write(f"{path} is another dataset and stays; --overwrite replaces it")
            else:
                write_dataset(one, path)
        return
    if args.train:
        folder = args.output or ROOT / "data" / "policies" / args.env
        if folder.is_file():
            fail(f"--output {folder}: with --train, expected the name of a folder.")
        if (folder / "references.json").exists() and not args.overwrite:
            fail(f"{folder} has policies already: add --overwrite to replace them, or choose another --output.")
        policies, prey = folder, "trained"
        if args.env in POLICIES_OF:  # nothing to learn, but returns to measure
            policies = ROOT / "data" / "policies" / POLICIES_OF[args.env]
        else:
            if mpe.make_task(args.env.removeprefix("mpe/")).num_prey:
                train_prey(args, folder)
                prey = mpe.load_prey(folder / "prey.npz")
            train(args, folder, args.train_episodes, prey)
        measure_references(args, policies, folder, prey)
        return
    path = args.output or default_path(args)
    if path.suffix != ".npz" or path.is_dir():
        fail(f"--output {path}: expected the name of a file that ends in .npz.")
    if path.exists() and not args.overwrite:
        fail(f"{path} exists already: add --overwrite to replace it, or choose another --output.")
    write_dataset(args, path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:
        fail(f"{error.filename or 'file'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        fail("interrupted; no file is left half written, and --all goes on where it stopped.")
