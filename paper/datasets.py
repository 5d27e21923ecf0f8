"""Print the cards of data/README.md from the dataset files, and draw two pictures beside it.

    python paper/datasets.py    # after data/collect_mpe.py --all and data/collect_smax.py --all

Prints one row per dataset and the checksums of the files (for `sha256sum -c`). Draws data/returns.png, the
distributions of episode returns, and data/training.png, the trainings of the behaviour policies.
"""

import csv
import hashlib
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import collect_mpe, files

COLOURS = {"random": "0.6", "medium-replay": "#e6ab02", "medium": "#7570b3", "expert": "#1b9e77"}


def card(path: Path) -> tuple[str, np.ndarray, dict]:
    """A Markdown row, the episode returns, and the metadata of a dataset file."""
    with np.load(path, allow_pickle=False) as file:
        rewards, ends, own = file["rewards"], file["terminals"] | file["timeouts"], file.get("individual_rewards")
        agents, metadata = file["observations"].shape[1], json.loads(str(file["metadata"]))
    returns = files.episode_returns(rewards, ends) / agents
    spread = f"{returns.mean():.1f}, {returns.std():.1f}, {returns.min():.0f} to {returns.max():.0f}"
    cells = [f"{metadata['env'].removeprefix('mpe/')} {metadata['quality']}", f"{len(rewards):,}", spread]
    if own is not None:
        apart = (own != own[:, :1]).any(axis=1).mean()
        even = np.square(own - rewards[:, None] / agents).mean()
        cells += [f"{own.mean():.2f}, {own.std():.2f}", f"{apart:.1%}", f"{even:.3f}" if apart else "0, exact"]
    else:
        cells += ["team only", "", ""]
    policy = metadata["policy"]
    learned = f"{policy['training_episodes']:,}" if policy else "none"
    return "| " + " | ".join([*cells, learned, f"{metadata['noise']:g}"]) + " |", returns, metadata


def battle_card(path: Path) -> str:
    """A Markdown row for a dataset of battles."""
    with np.load(path, allow_pickle=False) as file:
        rewards, own, masks = (file[key] for key in ("rewards", "individual_rewards", "action_masks"))
        metadata = json.loads(str(file["metadata"]))
    alive = masks.sum(axis=2) > 1  # [T, N]
    even = np.square(own - rewards[:, None] * alive / alive.sum(axis=1, keepdims=True).clip(1)).mean()
    team = [own.shape[1] * metadata[f"episode_return_{name}"] for name in ("mean", "std")]
    cells = [f"{metadata['env']} {metadata['quality']}", f"{len(own):,}", f"{metadata['episodes']:,}"]
    cells += [f"{metadata['win_rate']:.1%}", f"{team[0]:.1f}, {team[1]:.1f}", f"{1 - alive.mean():.1%}", f"{even:.4f}"]
    cells += [f"{metadata['policy']['training_transitions']:,}", f"{metadata['noise']:g}"]
    return "| " + " | ".join(cells) + " |"


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(files.ROOT)}"


def draw_returns(returns: dict[str, dict[str, np.ndarray]], references: dict[str, dict]) -> None:
    """A panel per task, a line per quality, dotted lines at the reference returns."""
    figure, axes = plt.subplots(-(-len(returns) // 4), 4, figsize=(13, 5.5))
    for axis, (env, qualities) in zip(axes.flat, returns.items(), strict=False):
        everything = np.concatenate(list(qualities.values()))
        low, high = np.quantile(everything, [0.001, 0.999])
        bins = np.linspace(low, high, 60)
        for quality, values in qualities.items():
            axis.hist(values, bins, density=True, histtype="step", color=COLOURS[quality], label=quality, linewidth=1.5)
        for reference in ("random_return", "expert_return"):
            axis.axvline(references[env][reference], color="0.5", linestyle=":", linewidth=1)
        axis.set(title=env.removeprefix("mpe/"), yticks=[])
        axis.set_xlabel("return per agent and episode", fontsize=8)
        axis.legend(frameon=False, fontsize=7)
    for axis in list(axes.flat)[len(returns) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(files.ROOT / "data" / "returns.png", dpi=100)


def draw_training() -> None:
    """The evaluation returns of every training of predators or agents, and when its medium policy was saved."""
    curves = sorted((files.ROOT / "data" / "policies" / "mpe").glob("*/training.csv"))
    figure, axes = plt.subplots(1, len(curves), figsize=(13, 2.8))
    for axis, path in zip(axes, curves, strict=True):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        episodes = [int(row["episodes"]) for row in rows]
        axis.plot(episodes, [float(row["eval_return"]) for row in rows], color=COLOURS["expert"], linewidth=1)
        _, metadata = files.load_policy(path.parent / "medium.npz")
        axis.axvline(metadata["training_episodes"], color=COLOURS["medium"], linestyle=":")
        axis.set_title(path.parent.name, fontsize=9)
        axis.set_xlabel("training episodes", fontsize=8)
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("return per agent and episode", fontsize=8)
    figure.tight_layout()
    figure.savefig(files.ROOT / "data" / "training.png", dpi=100)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(__doc__)
        raise SystemExit(0 if sys.argv[1] in ("-h", "--help") else 2)
    returns: dict[str, dict[str, np.ndarray]] = {}
    references, checksums = {}, []
    print("| dataset | transitions | return: mean, deviation, range | individual rewards: mean, deviation | ", end="")
    print("steps in which they differ | squared error of R / N | training episodes of the policy | noise |")
    print("|---" * 8 + "|")
    for env, quality in tqdm(collect_mpe.ALL, desc="datasets", unit="dataset"):
        path = files.ROOT / "data" / "datasets" / env / f"{quality}.npz"
        if not path.exists():
            print(f"datasets.py: {path} is missing; python data/collect_mpe.py --all records it", file=sys.stderr)
            continue
        row, returns.setdefault(env, {})[quality], references[env] = card(path)
        tqdm.write(row)
        checksums.append(checksum(path))
    if battles := sorted((files.ROOT / "data" / "datasets" / "smax").glob("*/*.npz")):
        print("\n| dataset | transitions | battles | won | team return: mean, deviation | ", end="")
        print(
            "agents dead | squared error of the even split | training steps of the policy | noise |\n"
            + "|---" * 9
            + "|"
        )
    for path in battles:
        print(battle_card(path))
        checksums.append(checksum(path))
    print("\n" + "\n".join(checksums))
    draw_returns(returns, references)
    draw_training()
