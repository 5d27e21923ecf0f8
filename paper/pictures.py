"""Draw what a run with `--credit macca` has learned: its causal graph, and its credit in one episode of its policy.

    python paper/pictures.py runs/RUN        # -> RUN/graph.png, RUN/credit.png, RUN/episode.gif, RUN/edges.png

graph.png is the paper's Figure 1, learned; edges.png its Figure 3, which needs the run's edges.npz (paper/edges.py).
"""

import importlib
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.animation import PillowWriter
from matplotlib.patches import Circle
from pettingzoo.utils import BaseParallelWrapper
from rows import ROOT, SCRIPTS, fail

sys.path.insert(0, str(ROOT))
from data import mpe


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """the run folder: runs/... of one of the MACCA scripts"""
    out: Path | None = None
    """folder for the pictures; the run folder if not given"""
    episode_seed: int = 0
    """reset seed of the episode"""


def dimension_names(env: str, owner: list[int], agents: int, action_dim: int) -> tuple[list, list]:
    """(block, group, dimension) for every dimension of the state, and for those of all agents' actions.

    `owner`: whose each dimension of the state is, -1 for nobody's. Cooperative Navigation's are known by name.
    """
    blocks = [f"agent {i + 1}" if i >= 0 else "nobody's" for i in owner]
    state = [(block, "", f"s{d}") for d, block in enumerate(blocks)]
    moves = [f"a{d}" for d in range(action_dim)]
    if env.startswith("mpe/simple_spread") and len(owner) == 18:
        groups = [*["velocity", "position"] * agents, *(f"landmark {i}" for i in (1, 2, 3))]
        state = [(block, groups[d // 2], "xy"[d % 2]) for d, block in enumerate(blocks)]
        moves = ["x", "y"] if action_dim == 2 else ["none", "left", "right", "down", "up"]
    return state, [(f"agent {i + 1}", "", move) for i in range(agents) for move in moves]


def draw_edges(
    path: Path, iterations: np.ndarray, edges: np.ndarray, state_names: list, action_names: list, h: float
) -> None:
    """The paper's Figure 3: edges [moments, N, S + N A] at up to four moments, the first and the last among them."""
    moments = np.unique(np.linspace(0, len(edges) - 1, 4).round().astype(int))
    states, agents, rows = len(state_names), edges.shape[1], len(moments)
    widths = [states, min(max(2 * len(action_names), states / 6), states)]
    size = (13, 1.9 + rows * max(0.8, 0.26 * agents))
    figure, panels = plt.subplots(rows, 2, squeeze=False, figsize=size, width_ratios=widths, layout="constrained")
    for row, moment in enumerate(moments):
        halves = np.split(edges[moment], [states], axis=1)
        for axes, names, half, width in zip(panels[row], (state_names, action_names), halves, widths, strict=True):
            image = axes.imshow(half, cmap="viridis_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            style = {"ha": "center", "xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "size": 8}
            for level, line in [(2, 0.7), (1, 2.0)]:  # groups, then blocks: lines between them, names beside them
                starts = [d for d in range(len(names)) if d == 0 or names[d][:level] != names[d - 1][:level]]
                for start, end in itertools.pairwise([*starts, len(names)]):
                    axes.axvline(start - 0.5, color="white", linewidth=line * (start > 0))
                    if level == 1 and row == 0:
                        axes.annotate(names[start][0], ((start + end - 1) / 2, 1), xytext=(0, 3), **style)
                    elif level == 2 and row == rows - 1:
                        place = {"xytext": (0, -13), "va": "top", "rotation": 90}
                        axes.annotate(names[start][1], ((start + end - 1) / 2, 0), **place, **style)
            if row == rows - 1:
                room = 90 * width / sum(widths)  # more labels than that would overlap
                shown = range(0, len(names), math.ceil(len(names) / room))
                turned = 90 * any(len(name[2]) > 1 for name in names)
                axes.set_xticks(shown, [names[d][2] for d in shown], rotation=turned, fontsize=7)
            axes.tick_params(length=0, pad=2)
        panels[row, 0].set_yticks(range(agents), [f"slot of agent {i + 1}" for i in range(agents)], fontsize=8)
        panels[row, 0].set_ylabel(f"iteration\n{iterations[moment]:,}", rotation=0, ha="right", va="center", labelpad=8)
    panels[0, 0].set_title("edges from the state", pad=18)
    panels[0, 1].set_title("edges from the actions", pad=18)
    bar = figure.colorbar(image, ax=panels, fraction=0.02, pad=0.01)
    bar.set_label("edge probability (counts from h on)", size=9)
    bar.ax.axhline(h, color="red")
    bar.ax.annotate("h", (0, h), xytext=(-9, -3), textcoords="offset points", color="red")
    figure.savefig(path, dpi=120)


def draw_graph(path: Path, edges: np.ndarray, names: list, h: float) -> None:
    """The paper's Figure 1, learned: mean probabilities [N, D] of the edges that count, at most 60, strongest first.

    Dimensions stand on the left, agents' slots r^i in the middle, R on the right.
    """
    agents, colours = len(edges), [f"C{i}" for i in range(len(edges))]
    strongest = [divmod(int(place), edges.shape[1]) for place in np.argsort(-edges, axis=None)[:60]]
    shown = [(i, d) for i, d in strongest if edges[i, d] >= h]
    parents = sorted({d for _, d in shown})
    heights = dict(zip(parents, np.linspace(1, 0, len(parents)), strict=True))
    slots = np.linspace(0.85, 0.15, agents)
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.2 * max(len(parents), 2 * agents)), layout="constrained")
    for i, d in shown:
        axes.plot([0, 1], [heights[d], slots[i]], color=colours[i], linewidth=2.5 * edges[i, d], alpha=0.7)
    for d in parents:
        name = " ".join(word for word in names[d] if word).removeprefix("nobody's ")
        axes.text(-0.02, heights[d], name, ha="right", va="center", fontsize=8)
    for i, height in enumerate(slots):
        axes.plot([1, 1.5], [height, 0.5], color="black", linewidth=1)
        circle = {"boxstyle": "circle", "facecolor": "white", "edgecolor": colours[i]}
        axes.text(1, height, f"$r^{i + 1}$", ha="center", va="center", bbox=circle)
    circle = {"boxstyle": "circle", "facecolor": "white", "edgecolor": "black"}
    axes.text(1.5, 0.5, "$R$", ha="center", va="center", bbox=circle)
    axes.set(xlim=(-0.6, 1.65), ylim=(-0.08, 1.08))
    title = f"{len(shown)} of the {int((edges >= h).sum())} edges that count, of {edges.size} possible"
    axes.set_title(f"{title}: width is the probability, colour the slot", fontsize=10)
    axes.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


class Recorder(BaseParallelWrapper):
    """Notes every step of the episodes that are played in an environment: as in a dataset, and as pictures."""

    def __init__(self, env, nets, joint: bool):
        super().__init__(env)
        self.nets, self.joint, self.steps, self.pictures = nets, joint, [], []

    def reset(self, seed=None, options=None):
        self.seen, self.infos = super().reset(seed, options)
        return self.seen, self.infos

    def step(self, actions):
        agents = self.possible_agents  # of those that have left, what they see and do is 0
        blank, idle = 0 * next(iter(self.seen.values())), 0 * next(iter(actions.values()))
        everything = np.ones(self.nets.action_dim, bool)
        masks = [np.array(self.infos.get(agent, {}).get("action_mask", everything), bool) for agent in agents]
        step: dict[str, Any] = {"observations": [self.seen.get(agent, blank) for agent in agents]}
        step |= {} if self.joint else {"states": self.state()}
        step |= {"action_masks": masks} if self.nets.discrete else {}
        step["actions"] = [actions.get(agent, idle) for agent in agents]
        step["alive"] = [agent in actions and mask.sum() > 1 for agent, mask in zip(agents, masks, strict=True)]
        self.seen, rewards, *ends, self.infos = super().step(actions)
        step["individual_rewards"] = [rewards.get(agent, 0.0) for agent in agents]
        self.steps.append(step)
        if isinstance(self.env, mpe.ParticleEnv):  # where the step ended: that is what its reward is paid for
            self.pictures.append((self.env.render(), self.env.positions_and_velocities()[0][: len(agents)]))
        return self.seen, rewards, *ends, self.infos

    def batch(self) -> dict[str, torch.Tensor]:
        """The steps as a batch of transitions, as far as credit needs it."""
        tensors = {name: torch.tensor(np.array([step[name] for step in self.steps])) for name in self.steps[0]}
        tensors["rewards"] = tensors["individual_rewards"].sum(1)
        return {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}


def draw_credit(path: Path, credit: np.ndarray, paid: np.ndarray, seed: int) -> None:
    """The credit and what the agents were paid, both [T, N], over the steps of an episode, a panel for each agent."""
    steps, agents = np.arange(1, len(credit) + 1), credit.shape[1]
    even, size = paid.mean(1, keepdims=True), (8, 1.4 + 1.5 * agents)
    figure, panels = plt.subplots(agents, sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained")
    for i, axes in enumerate(panels[:, 0]):
        axes.plot(steps, paid[:, i], color="black", linewidth=4, alpha=0.3, label="paid")
        axes.plot(steps, credit[:, i], color=f"C{i}", marker=".", label="credit")
        axes.plot(steps, even, color="black", linewidth=0.8, label="even split R / N")
        axes.set_ylabel(f"agent {i + 1}'s reward")
    panels[-1, 0].set_xlabel("step")
    panels[-1, 0].locator_params(axis="x", integer=True)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    told, spread = "all are paid the same", (even - paid).var(0).sum()
    if spread > 1e-9 * np.square(paid.sum(1)).mean():  # as in CausalModel.report
        told = f"paid skill {1 - (credit - paid).var(0).sum() / spread:.3g} (1: as paid, 0: as the even split)"
    figure.suptitle(f"Credit, and what agents are paid, in the episode of seed {seed}; {told}", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_episode(path: Path, credit: np.ndarray, paid: np.ndarray, pictures: list, radius: float) -> None:
    """The episode as an animation, each step's credit as bars beside it; `radius` is an agent's."""
    rows, low, high = np.arange(credit.shape[1]), min(0, credit.min(), paid.min()), max(0, credit.max(), paid.max())
    margin = 0.05 * (high - low) or 1.0
    figure, (world, bars) = plt.subplots(1, 2, figsize=(7.4, 3.9), width_ratios=[1.1, 1])
    figure.subplots_adjust(left=0.02, right=0.97, bottom=0.22, top=0.91, wspace=0.28)
    writer = PillowWriter(fps=10)
    with writer.saving(figure, str(path), dpi=85):
        for step, (image, positions) in enumerate(pictures):
            world.clear()
            world.imshow(image, extent=(-1.5, 1.5, -1.5, 1.5))  # as ParticleEnv.render says
            world.set(xticks=[], yticks=[], title=f"step {step + 1} of {len(pictures)}")
            for i, (x, y) in enumerate(positions):
                world.add_patch(Circle((x, y), radius, fill=False, color=f"C{i}", linewidth=2))
                world.text(x, y, f"{i + 1}", ha="center", va="center", weight="bold", clip_on=True)
            bars.clear()
            bars.barh(rows, credit[step], 0.6, color=[f"C{i}" for i in rows], label="credit")
            bars.vlines(paid[step], rows - 0.4, rows + 0.4, color="black", label="paid")
            bars.axvline(paid[step].mean(), color="gray", linestyle=":", label="even split")
            bars.axvline(0, color="black", linewidth=0.8)
            bars.set_yticks(rows, [f"agent {i + 1}\n{credit[step, i]:.1f}" for i in rows])
            bars.set(xlim=(low - margin, high + margin), ylim=(len(rows) - 0.5, -0.5))
            bars.locator_params(axis="x", nbins=5)
            bars.set(title=f"team reward {paid[step].sum():.1f}", xlabel="reward of the step")
            bars.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
            for _ in range(10 if step + 1 == len(pictures) else 1):  # a second's rest before it starts again
                writer.grab_frame()


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    out = args.out or args.run
    try:
        checkpoint = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)
        if (credit := checkpoint["args"]["credit"]) != "macca":
            fail(f"{args.run} was trained with --credit {credit}; only macca trains a causal model to draw")
        script: Any = importlib.import_module(Path(SCRIPTS[SCRIPTS.index(checkpoint["script"])]).stem)
        trained = script.Args(**checkpoint["args"])
        env, _ = script.make_env(trained.env)
        data, metadata = script.load_dataset(Path(trained.dataset), trained, env)
        nets, causal_model, _ = script.build(trained, data, metadata)
        nets.load_state_dict(checkpoint["nets"])
        causal_model.load_state_dict(checkpoint["causal_model"])
        graph = args.run / "edges.npz"
        recorded = dict(np.load(graph, allow_pickle=False)) if graph.exists() else {}
    except Exception as error:  # torch raises many kinds here
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fail(f"{args.run} is no run folder that can be drawn ({reason}); expected one that a MACCA script has written")

    joint, particles = "states" not in data, trained.env.startswith("mpe/")
    if particles:
        env = mpe.parallel_env(trained.env.removeprefix("mpe/"), render_mode="rgb_array")
    recorder = Recorder(env, nets, joint)
    try:
        script.evaluate(recorder, nets, {}, 1, args.episode_seed)
        batch = recorder.batch()
        inputs = (*script.causal_inputs(batch), batch["rewards"], batch["alive"])
        credit = causal_model.assign(*inputs).numpy()  # [T, N]
    except Exception as error:  # whatever somebody else's environment may raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fail(f"no episode of {trained.env} can be played with the policy of {args.run} ({reason})")
    try:
        out.mkdir(parents=True, exist_ok=True)
        agents, state_dim = credit.shape[1], len(causal_model.state_mean)
        observer = [d * agents // state_dim for d in range(state_dim)]
        names = dimension_names(trained.env, observer if joint else metadata["state_owner"], agents, nets.action_dim)
        if recorded:
            draw_edges(out / "edges.png", recorded["iterations"], recorded["edges"], *names, trained.h)
            print(out / "edges.png")
        else:
            print("no edges.png: the run has no edges.npz, which paper/edges.py records")
        torch.manual_seed(0)
        rows = script.causal_inputs(script.sample(data, 5_000))
        edges = torch.cat(causal_model.probabilities(*rows), dim=2).mean(0).numpy()
        moves = [(who, "action", move) for who, _, move in names[1]]
        draw_graph(out / "graph.png", edges, [*names[0], *moves], trained.h)
        print(out / "graph.png")
        paid = batch["individual_rewards"].numpy()
        draw_credit(out / "credit.png", credit, paid, args.episode_seed)
        print(out / "credit.png")
        if particles:
            draw_episode(out / "episode.gif", credit, paid, recorder.pictures, env.world.agents[0].size)
            print(out / "episode.gif")
        else:
            print(f"no episode.gif: of the environments only the mpe tasks can be rendered, not {trained.env}")
    except OSError as error:
        fail(f"the pictures cannot be written to {out} ({error}); give another folder with --out")
