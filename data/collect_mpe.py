"""Train behaviour policies on the particle tasks (data/mpe.py), and record offline datasets with them.

    python data/collect_mpe.py --env mpe/simple_tag --quality medium      # a million transitions, shipped weights
    python data/collect_mpe.py --all                                      # every particle dataset of data/README.md
    python data/collect_mpe.py --env mpe/simple_tag --train --overwrite   # train the weights again

The algorithm is TD3 (Fujimoto et al. 2018, https://arxiv.org/abs/1802.09477). Each agent has an actor on its own
observation. Two centralised critics see all observations and actions. They predict the mean of the agents' returns, so
they need no credit assignment. With discrete actions the actors sample from a Gumbel-softmax, as in MADDPG. In tasks
with prey, predators and prey first learn against each other. Then the prey is frozen, and new predators learn against
it. The four qualities follow D4RL and OMAR (https://arxiv.org/abs/2111.11188):

    random         freshly initialised stochastic actors, new ones in every episode
    medium-replay  every episode of such a training, until it reached the medium policy
    medium         the first policy that is as far between random and expert as OMAR's medium data
    expert         the policy with the best evaluation in the training

Many worlds are played at a time (`BatchedEnv` of data/mpe.py). Every dataset also gets the state factored by agent and
the Shapley values of the team reward, which take most of the time. data/README.md describes the file format.
"""

import copy
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the package `data` is
from data import files, mpe

# The paper's scores are normalised with these returns of a random and an expert policy. We also store our own.
PAPER_RETURNS = {
    "mpe/simple_spread": (160.042, 516.526),
    "mpe/simple_tag": (-2.569, 90.637),
    "mpe/simple_world": (-8.734, 34.661),
    "mpe/simple_world_3v1": (-8.734, 34.661),
}
TEAM_REWARD_ONLY = ("mpe/simple_spread_sparse",)  # no part of this reward belongs to one agent
# These tasks differ from another task in their reward only, so that task's policies play them.
POLICIES_OF = {
    "mpe/simple_spread_sparse": "mpe/simple_spread",
    "mpe/simple_tag_local": "mpe/simple_tag",
    "mpe/simple_world_local": "mpe/simple_world",
}
# Where the mean return of OMAR's medium datasets lies between that of its random and that of its expert datasets.
MEDIUM_SHARE = {"simple_spread": 0.31, "simple_tag": 0.57, "simple_world": 0.79}
FOUR, TWO = ("random", "medium-replay", "medium", "expert"), ("medium", "expert")
ALL = [(f"mpe/{task}", quality) for task in ("simple_spread", "simple_tag", "simple_world") for quality in FOUR]
ALL += [
    (f"mpe/{task}", quality)
    for task in ("simple_spread_sparse", "simple_spread_discrete", "simple_tag_local", "simple_world_local")
    for quality in TWO
]
SCRIPT = "collect_mpe.py"
REFERENCES = 32  # rows that Shapley values compare with
LOCKSTEP = 100  # worlds that training plays at a time
EVALUATED = 400  # worlds that an evaluation plays at a time


@dataclass
class Args:
    env: str = "mpe/simple_spread"  # mpe/ and a task of data/mpe.py
    quality: Literal["random", "medium-replay", "medium", "expert"] = "expert"  # which policies act in the dataset
    transitions: int = 1_000_000  # size of the dataset, rounded down to whole episodes (medium-replay: at most)
    noise: float = 0.1  # medium, expert: standard deviation of the noise (discrete: fraction of random moves)
    seed: int = 0  # the same seed, machine and package versions give the same dataset
    output: Path | None = None  # by default data/datasets/ENV/QUALITY.npz; with --train a folder, data/policies/ENV
    overwrite: bool = False  # replace the file (with --train: the policies) if it exists
    all: bool = False  # record every dataset of data/README.md that is missing; --overwrite also replaces other files
    train: bool = False  # train the behaviour policies instead of recording a dataset

    # Training (--train; medium-replay uses the settings that its medium policy was trained with)
    train_episodes: int = 40_000  # episodes of training, in rounds of 100
    prey_episodes: int = 20_000  # episodes before, in which predators and prey learn against each other
    updates_per_round: int = 250  # gradient updates after every round of 100 episodes
    batch_size: int = 256  # transitions per update
    learning_rate: float = 1e-3  # Adam's learning rate; it falls linearly to a tenth
    gamma: float = 0.95  # discount factor
    tau: float = 0.01  # fraction of the way that target networks move towards their networks in each update
    exploration_noise: float = 0.2  # standard deviation of the noise on the actions of training episodes
    eval_interval: int = 200  # training episodes between two evaluations
    eval_episodes: int = 400  # episodes of an evaluation


def check_args(args: Args) -> None:
    if args.env.removeprefix("mpe/") not in mpe.TASKS or not args.env.startswith("mpe/"):
        files.fail(f"--env is {args.env}, expected mpe/ and one of {', '.join(mpe.TASKS)}")
    files.check_range(args, 1, np.inf, "transitions", "batch_size", "eval_interval", "eval_episodes")
    files.check_range(args, 0, np.inf, "seed", "noise", "exploration_noise", "updates_per_round")
    files.check_range(args, 1e-9, np.inf, "learning_rate", "tau")
    files.check_range(args, 4 * LOCKSTEP, np.inf, "train_episodes", "prey_episodes")
    files.check_range(args, 0, 1, "gamma")


class StackedMLP(nn.Module):
    """`n` separate networks of three layers; one batched matrix product per layer: [n, B, in] -> [n, B, out]."""

    def __init__(self, n: int, inputs: int, outputs: int, hidden: int = 128):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in [(inputs, hidden), (hidden, hidden), (hidden, outputs)]:
            bound = fan_in**-0.5  # as torch.nn.Linear
            self.weights.append(nn.Parameter(torch.empty(n, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(n, 1, fan_out).uniform_(-bound, bound)))

    def forward(self, x):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = F.relu(x) if i < 2 else x
        return x


def save_policy(path: Path, actor: StackedMLP, metadata: dict) -> None:
    arrays = {f"weight_{i}": p.detach().numpy() for i, p in enumerate(actor.weights)}  # [N, in, out]
    arrays |= {f"bias_{i}": p.detach().numpy() for i, p in enumerate(actor.biases)}  # [N, 1, out]
    files.save(path, arrays, metadata)


def load_policy(path: Path) -> tuple[StackedMLP, dict]:
    arrays, metadata = files.load_policy(path)
    actor = StackedMLP(len(arrays["weight_0"]), arrays["weight_0"].shape[1], arrays["weight_2"].shape[2])
    with torch.no_grad():
        for i in range(3):
            actor.weights[i].copy_(torch.from_numpy(arrays[f"weight_{i}"]))
            actor.biases[i].copy_(torch.from_numpy(arrays[f"bias_{i}"]))
    return actor, metadata


# ---- playing ----
def make_env(name: str, number: int, prey: str | mpe.PreyPolicy = "trained") -> mpe.BatchedEnv:
    try:
        return mpe.BatchedEnv(name.removeprefix("mpe/"), number, prey)
    except ValueError as error:  # the prey's weights are missing or damaged
        files.fail(str(error))


def sizes(env: mpe.BatchedEnv) -> tuple[int, int, int, int]:
    """(number of agents, obs_dim, outputs of an actor, number of moves or 0 for continuous actions)"""
    moves = len(mpe.DISCRETE_FORCES) if env.task.discrete else 0
    return env.task.num_agents, env.task.obs_dim, moves or 2, moves


def act_with(actor: StackedMLP, moves: int, noise: float, rng: np.random.Generator):
    """A policy: [E, N, obs_dim] -> actions [E, N, act_dim] in [-1, 1] with Gaussian noise.

    If there are `moves`: -> the best of them [E, N], a random one with probability `noise`.
    """

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
    """Freshly initialised actors, another one for every agent of every world: [E, N, obs_dim] -> [E, N, ...].

    They are stochastic, as the random policies of D4RL: tanh of the output plus unit Gaussian noise, and with discrete
    actions a draw from the softmax of the outputs. So the actions of an episode vary.
    """
    agents, obs_dim, outputs, moves = sizes(env)
    actor = StackedMLP(env.number * agents, obs_dim, outputs)

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        out = actor(torch.from_numpy(obs).reshape(-1, 1, obs_dim)).reshape(env.number, agents, outputs)
        if moves:  # the largest of outputs plus Gumbel noise is such a draw
            return (out - torch.empty_like(out).exponential_().log()).argmax(-1).numpy()
        return torch.tanh(out + torch.randn_like(out)).numpy()

    return act


def play(env: mpe.BatchedEnv, act, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One episode in every world, with `act`: [E, N, obs_dim] -> [E, N, ...].

    Returns transitions, episode after episode: observations [T, N, obs_dim], actions [T, N, ...], individual_rewards
    [T, N], positions of all M entities after the step [T, M, 2], terminals [T], timeouts [T], and final_observations
    [E, N, obs_dim].
    """
    steps = []  # of tuples (observations, actions, rewards, positions), each [E, ...]
    obs = env.reset(int(rng.integers(2**31)))
    for _ in range(mpe.EPISODE_STEPS):
        actions = act(obs)
        next_obs, rewards = env.step(actions)
        steps.append((obs, actions, rewards, env.pos.astype(np.float32)))
        obs = next_obs
    columns = [np.stack(column, axis=1) for column in zip(*steps, strict=True)]  # [E, 25, ...]
    return as_data(*(column.reshape(-1, *column.shape[2:]) for column in columns)) | {"final_observations": obs}


def as_data(observations, actions, rewards, positions) -> dict[str, np.ndarray]:
    """Whole episodes [T, ...] under the names of the file format, and positions, which no file holds."""
    data = {"observations": observations, "actions": actions, "individual_rewards": rewards, "positions": positions}
    data["terminals"] = np.zeros(len(rewards), bool)
    return data | {"timeouts": np.arange(1, len(rewards) + 1) % mpe.EPISODE_STEPS == 0}


def next_observations(data: dict[str, np.ndarray]) -> np.ndarray:
    """[T, N, obs_dim]: the next row's observation; after the last row of an episode, its final observation."""
    following = np.concatenate([data["observations"][1:], data["observations"][-1:]])
    following[data["terminals"] | data["timeouts"]] = data["final_observations"]
    return following


def evaluate(env: mpe.BatchedEnv, make_act, episodes: int, seed: int) -> np.ndarray:
    """Returns [episodes], means over agents; `make_act()` gives the policy of the next `env.number` episodes."""
    rng, returns = np.random.default_rng(seed), []
    while len(returns) < episodes:
        data = play(env, make_act(), rng)
        returns.extend(files.episode_returns(data["individual_rewards"].mean(axis=1), data["timeouts"]))
    return np.array(returns[:episodes])


# ---- training ----
class Learner:
    """TD3 for one side, predators or prey: an actor per agent, twin critics of the joint observation and action."""

    def __init__(self, agents: int, obs_dim: int, outputs: int, moves: int, args: Args, hidden: int = 128):
        self.args, self.moves, self.updates = args, moves, 0
        self.actor = StackedMLP(agents, obs_dim, outputs, hidden)
        self.critic = StackedMLP(2, agents * (obs_dim + outputs), 1)
        self.actor_target, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.learning_rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.learning_rate, fused=True)

    def q_values(self, critic, obs, actions):  # [B, N, obs_dim], [B, N, outputs] -> [2, B]
        joint = torch.cat([obs, actions], dim=-1).flatten(1)
        return critic(joint.expand(2, -1, -1)).squeeze(-1)

    def policy(self, actor, obs):  # [B, N, obs_dim] -> [B, N, outputs]
        out = actor(obs.transpose(0, 1)).transpose(0, 1)
        return F.gumbel_softmax(out, hard=True) if self.moves else torch.tanh(out)

    def update(self, replay: "Replay", rng: np.random.Generator, progress: float) -> None:
        """A round of gradient steps; `progress` goes from 0 to 1 over the training."""
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
                # Every episode ends by time limit, so every transition bootstraps. A tenth keeps Q near 10.
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
    """Every transition of a training, in order."""

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
            noise = args.exploration_noise if episode >= 500 else 1.0  # the first actions are close to random
            act, flee = (act_with(learner.actor, 0, noise, rng) for learner in (predators, prey))
            obs = env.reset(int(rng.integers(2**31)))
            prey_obs = env.task.prey_observations(env.pos, env.vel)
            for _ in range(mpe.EPISODE_STEPS):
                actions, fled = act(obs), flee(prey_obs)
                env.prey = lambda _, fled=fled: fled
                next_obs, rewards = env.step(actions)
                next_prey_obs = env.task.prey_observations(env.pos, env.vel)
                replays[0].add(obs, actions, rewards, next_obs)
                replays[1].add(prey_obs, fled, env.task.prey_rewards(env.pos), next_prey_obs)
                obs, prey_obs = next_obs, next_prey_obs
                caught.append(float((rewards > 0).mean()))
            if episode >= 500:
                for learner, replay in zip((predators, prey), replays, strict=True):
                    learner.update(replay, rng, episode / args.prey_episodes)
            progress.update(LOCKSTEP)
            progress.set_postfix(caught=f"{np.mean(caught[-500:]):.1%}")
    origin = {"env": args.env, "seed": args.seed, "activations": "relu, relu, tanh", "updates": prey.updates}
    save_policy(folder / "prey.npz", prey.actor, origin | {"training": files.settings(args, "train_episodes")})


def train(
    args: Args, folder: Path | None, episodes: int, prey: str | mpe.PreyPolicy = "trained"
) -> dict[str, np.ndarray]:
    """Train TD3 for `episodes` of the `args.train_episodes` that its schedule is made for.

    With a folder, it also evaluates and writes the medium policy, the expert policy and the learning curve there.
    Returns all transitions as `play` does; the medium-replay dataset is their beginning.
    """
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    env, judge = make_env(args.env, LOCKSTEP, prey), make_env(args.env, EVALUATED, prey)
    moves = sizes(env)[3]
    learner, replay, positions = Learner(*sizes(env), args), Replay(episodes * mpe.EPISODE_STEPS), []
    snapshots: list[tuple[int, int, float, StackedMLP]] = []  # (episodes, updates, return, actor)
    progress = tqdm(total=episodes, unit="episode", desc="training", mininterval=2)
    for episode in range(0, episodes - LOCKSTEP + 1, LOCKSTEP):
        noise = args.exploration_noise if episode >= 200 else 1.0  # the first actions are close to random
        new = play(env, act_with(learner.actor, moves, noise, rng), rng)
        replay.add(new["observations"], new["actions"], new["individual_rewards"], next_observations(new))
        positions.append(new["positions"])
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
            save_policy(folder / f"{quality}.npz", actor, origin | {"training": files.settings(args, "train_episodes")})
        rows = [(done, done * mpe.EPISODE_STEPS, n, round(score, 2)) for done, n, score, _ in snapshots]
        files.write_csv(folder / "training.csv", ("episodes", "transitions", "updates", "eval_return"), rows)

    observations, actions, rewards, following = (column[: replay.filled].numpy() for column in replay.columns)
    data = as_data(observations, actions.astype(np.int64) if moves else actions, rewards, np.concatenate(positions))
    return data | {"final_observations": following[data["timeouts"]]}


def measure_references(args: Args, policies: Path, folder: Path, prey: str | mpe.PreyPolicy) -> None:
    """Evaluate the policies without noise and write the returns that scores need to `folder`/references.json."""
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
        mean, error = float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
        references |= {f"{quality}_return": round(mean, 3), f"{quality}_return_standard_error": round(error, 3)}
        print(f"{quality:>6}: {mean:.1f} +- {error:.1f} (1000 episodes)")
    files.write_json(folder / "references.json", references)


def train_policies(args: Args, folder: Path) -> None:
    """All of a task's policies: first the prey, then the predators or agents."""
    if args.env in POLICIES_OF:  # nothing to learn, only returns to measure
        measure_references(args, files.ROOT / "data" / "policies" / POLICIES_OF[args.env], folder, "trained")
        return
    prey = "trained"
    if mpe.make_task(args.env.removeprefix("mpe/")).num_prey:
        train_prey(args, folder)
        prey = mpe.load_prey(folder / "prey.npz")
    train(args, folder, args.train_episodes, prey)
    measure_references(args, folder, folder, prey)


# ---- recording ----
def record(args: Args) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a dataset, with at least as many rows as asked for if there are, and the collector's metadata."""
    folder = files.ROOT / "data" / "policies" / POLICIES_OF.get(args.env, args.env)
    actor, policy, noise = None, {}, 0.0
    if args.quality != "random":
        actor, policy = load_policy(folder / ("expert.npz" if args.quality == "expert" else "medium.npz"))
        noise = args.noise
    if args.quality == "medium-replay":
        training = dataclasses.replace(args, **policy["training"])
        episodes = min(policy["training_episodes"], max(args.transitions // mpe.EPISODE_STEPS, LOCKSTEP))
        data, noise = train(training, None, episodes), training.exploration_noise
    else:
        data = play_rounds(args, actor)
    data["rewards"] = data["individual_rewards"].sum(axis=1)
    about = add_states_and_causes(args, data)
    if args.env in TEAM_REWARD_ONLY:
        del data["individual_rewards"]
    names = ("paper_random_return", "paper_expert_return")
    paper = dict(zip(names, PAPER_RETURNS[args.env], strict=True)) if args.env in PAPER_RETURNS else {}
    return data, {"noise": noise, **paper, **about, "policy": policy}


def add_states_and_causes(args: Args, data: dict[str, np.ndarray]) -> dict[str, list[int]]:
    """Add `states` and `shapley_rewards` to whole episodes, in place of `positions`; returns the states' owners.

    Cuts the episodes to those within --transitions, because the Shapley values compare with rows of the file.
    """
    name, kept = args.env.removeprefix("mpe/"), max(args.transitions // mpe.EPISODE_STEPS, 1)
    rows = kept * mpe.EPISODE_STEPS
    data |= {key: column[: kept if key.startswith("final_") else rows] for key, column in data.items()}
    data["states"], owner = mpe.factored_states(name, data["observations"])
    positions = data.pop("positions")
    agents = positions[:, : data["observations"].shape[1]]
    references = agents[np.random.default_rng(0).integers(len(agents), size=REFERENCES)]  # [K, N, 2]
    data["shapley_rewards"] = mpe.shapley_rewards(name, positions, data["rewards"], references)
    return {"state_owner": owner}


def play_rounds(args: Args, actor: StackedMLP | None) -> dict[str, np.ndarray]:
    """Episodes of one actor, or of another random one each, until there are enough transitions."""
    # Every world of a random dataset has its own actors, so only 200 worlds fit well into memory.
    worlds = min(200 if actor is None else 1000, max(args.transitions // mpe.EPISODE_STEPS, 1))
    env = make_env(args.env, worlds)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    rounds, rows = [], 0
    with tqdm(total=args.transitions, unit="transition", unit_scale=True, desc="recording", mininterval=1) as progress:
        while rows < args.transitions:
            act = act_random(env) if actor is None else act_with(actor, sizes(env)[3], args.noise, rng)
            rounds.append(play(env, act, rng))
            rounds[-1]["individual_rewards"] = rounds[-1]["individual_rewards"].astype(np.float32)
            rows += len(rounds[-1]["terminals"])
            progress.update(len(rounds[-1]["terminals"]))
    return {name: np.concatenate([data[name] for data in rounds]) for name in rounds[0]}


def main(args: Args) -> None:
    torch.set_num_threads(1)  # more threads add in another order, and the files differ in their last digits
    check_args(args)
    if args.train:
        train_policies(args, files.output_folder(args))
        return
    for one, path in files.outputs(args, SCRIPT, ALL):
        data, about = record(one)
        files.write_dataset(path, one, SCRIPT, data, about, ("numpy", "torch", "mpe2"))


if __name__ == "__main__":
    files.run(lambda: main(tyro.cli(Args, description=__doc__)))
