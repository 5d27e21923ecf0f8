"""Behaviour cloning: the floor under every table. Each agent imitates the dataset's actions; no reward is looked at.

    python paper/bc.py --env mpe/simple_spread --dataset expert

The actors, the dataset, the evaluation and the run folder's metrics.csv are those of the MACCA scripts.
"""

import csv
import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import macca_omar as base


@dataclass
class Args:
    env: str = "mpe/simple_spread"
    """where to evaluate, as in the MACCA scripts"""
    dataset: str = "expert"
    """an .npz file, or `random`, `medium-replay`, `medium`, `expert`"""
    seed: int = 1
    """seed of weights, minibatches and evaluation episodes"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU"""
    total_iterations: int = 3_000
    """gradient steps"""
    batch_size: int = 256
    """transitions in a minibatch, each with all agents"""
    learning_rate: float = 1e-3
    """Adam's learning rate"""
    hidden_dim: int = 64
    """width of the two hidden layers"""
    last_action: bool = True
    """actors see the agent's last action too (discrete actions)"""
    eval_interval: int = 1000
    """iterations between evaluations"""
    eval_episodes: int = 32
    """episodes of an evaluation during training"""
    final_episodes: int = 100
    """episodes of the evaluation at the end"""


def cloning_loss(actor: base.Actor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Squared distance to the data's actions, or their cross-entropy where discrete, summed over agents."""
    observations, actions = batch["observations"].transpose(0, 1), batch["actions"].transpose(0, 1)  # [N, B, ...]
    if actor.discrete:
        logits = actor(observations, batch["action_masks"].transpose(0, 1))  # [N, B, A]
        distance = F.cross_entropy(logits.flatten(0, 1), actions.flatten(), reduction="none").view_as(actions)
        return (distance * batch["alive"].T).mean(1).sum()
    return (actor(observations) - actions).square().sum(2).mean(1).sum()


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    shared = base.Args(**{**dataclasses.asdict(args), "credit": "uniform"})  # cloning assigns no credit
    base.check_args(shared)
    env = base.make_env(args.env)
    path = base.dataset_path(shared)
    data, metadata = base.load_dataset(path, shared, env)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    data, held_out = ({name: tensor.to(device) for name, tensor in part.items()} for part in base.hold_out(data))
    space = env.action_space(env.possible_agents[0])
    discrete = isinstance(space, gymnasium.spaces.Discrete)
    agents, observation_dim = data["observations"].shape[1:]
    action_dim = int(space.n) if discrete else space.shape[0]
    nets = base.Networks(agents, observation_dim, action_dim, discrete, shared).to(device)
    nets.fit_statistics(data["observations"], data["terminals"] | ~data["next_alive"].all(1))
    optimizer = torch.optim.Adam(nets.actor.parameters(), lr=args.learning_rate, fused=True)

    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run = Path("runs") / f"{args.env.replace('/', '-')}__bc__none__{args.seed}__{stamp}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"args": dataclasses.asdict(args), **base.provenance(path)}, indent=2))
    rows, started = [], time.monotonic()
    for iteration in tqdm(range(1, args.total_iterations + 1), unit="it", mininterval=1):
        loss = cloning_loss(nets.actor, base.sample(data, args.batch_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = iteration == args.total_iterations
        if last or iteration % args.eval_interval == 0:
            episodes = args.final_episodes if last else args.eval_episodes
            row = base.measure(env, nets, None, held_out, metadata, shared, episodes)
            rows.append({"iteration": iteration, "episodes": episodes, "seconds": time.monotonic() - started, **row})
            with open(run / "metrics.csv", "w", newline="") as file:
                table = csv.DictWriter(file, rows[0].keys())
                table.writeheader()
                table.writerows(rows)
            tqdm.write(f"iteration {iteration}: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()))
    print(f"run folder: {run}")
