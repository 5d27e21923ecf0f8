"""What the collectors and the converter share: errors in one sentence, whole files, a dataset's metadata.

It needs NumPy only, so recording battles loads no torch and recording particle tasks no JAX.
"""

import contextlib
import csv
import dataclasses
import importlib
import json
import math
import os
import signal
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
UNREADABLE = (ValueError, OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


def fail(message: str) -> NoReturn:
    """A mistake of the user's: one sentence, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        fail(f"this format needs the package {package}, which is not installed; pip install {package}")


def run(main: Callable[[], None]) -> None:
    """Run a command. Whatever stops it, it prints one sentence and deletes its temporary files."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by default, Python would skip `finally`
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail("interrupted; no file is half written, and the same command starts again")


# ---- arguments ----
def check_range(args, low: float, high: float, *flags: str) -> None:
    for flag in flags:
        value = getattr(args, flag)
        if not low <= value <= high or math.isinf(value):
            fail(f"--{flag.replace('_', '-')} is {value}, expected a number from {low} to {high}")


def output_file(args) -> Path:
    """The file that --output, or else --env and --quality, ask for."""
    path = args.output or ROOT / "data" / "datasets" / args.env / f"{args.quality}.npz"
    if path.suffix != ".npz" or path.is_dir():
        fail(f"--output is {path}, expected the name of a file that ends in .npz")
    if path.exists() and not args.overwrite:
        fail(f"{path} exists; add --overwrite to replace it, or choose another --output")
    return path


def output_folder(args) -> Path:
    """The folder that --train writes policies to."""
    path = args.output or ROOT / "data" / "policies" / args.env
    if path.is_file():
        fail(f"--output is the file {path}, expected a folder with --train")
    if (path / "references.json").exists() and not args.overwrite:
        fail(f"{path} holds policies; add --overwrite to replace them, or choose another --output")
    return path


def outputs(args, script: str, everything: list[tuple[str, str]]) -> Iterator[tuple[Any, Path]]:
    """The datasets to record, as (arguments, file): one, or with --all those of `everything` that are missing."""
    if not args.all:
        yield args, output_file(args)
        return
    if args.output:
        fail("--output names one file, but --all writes many; leave one of them out")
    for env, quality in everything:
        one = dataclasses.replace(args, all=False, overwrite=True, env=env, quality=quality)
        path = output_file(one)
        if path.exists() and read_metadata(path).get("command") == command(script, one):
            continue
        if path.exists() and not args.overwrite:
            print(f"{path} is another dataset and stays; --overwrite replaces it")
        else:
            yield one, path


def command(script: str, args) -> str:
    """The command that makes this dataset again, but for the name of a source."""
    words = ["python", f"data/{script}"]
    for name, value in vars(args).items():
        always, never = (
            name in ("env", "quality", "transitions", "seed"),
            name in ("output", "overwrite", "all", "source"),
        )
        if always or (not never and value != getattr(type(args), name)):
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(x) for x in (value if isinstance(value, tuple) else [value])]
    return " ".join(words)


def settings(args, first: str) -> dict:
    """The arguments from `first` on: those that a training depends on."""
    names = list(vars(args))
    return {name: getattr(args, name) for name in names[names.index(first) :]}


# ---- files ----
@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`. At the end that file replaces `path`; after an error it is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """An .npz file, compressed fast."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, value in {**arrays, "metadata": np.array(json.dumps(metadata, indent=1))}.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value, allow_pickle=False)


def write_csv(path: Path, header: tuple, rows: list[tuple]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def load_policy(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The weights and the metadata of a policy that --train wrote."""
    if not path.exists():
        fail(f"{path} is missing; train the behaviour policies with --train")
    try:
        with np.load(path, allow_pickle=False) as file:
            weights = {f"{kind}_{i}": file[f"{kind}_{i}"] for kind in ("weight", "bias") for i in range(3)}
            return weights, json.loads(str(file["metadata"]))
    except UNREADABLE as error:
        fail(f"{path} is not a policy that --train wrote ({error}); train it again with --train --overwrite")


def read_metadata(path: Path) -> dict:
    """The metadata of a dataset, empty if it has none that is the text of a JSON object."""
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"]))
    except Exception:  # damaged bytes raise anything
        return {}
    return metadata if isinstance(metadata, dict) else {}


# ---- a dataset ----
def episode_returns(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[E]: the sums of the rewards [T] over the episodes; `ends` [T] marks their last rows."""
    starts = np.append(0, np.flatnonzero(ends)[:-1] + 1)
    return np.add.reduceat(rewards.astype(np.float64), starts)


def statistics(rewards: np.ndarray, ends: np.ndarray, agents: int) -> dict[str, float]:
    """Of team rewards [T]. A return is the sum over an episode, mean over the agents."""
    returns = episode_returns(rewards, ends) / agents
    found = {f"episode_return_{name}": float(getattr(returns, name)()) for name in ("mean", "std", "min", "max")}
    return {"transitions": len(rewards), "episodes": len(returns), **found}


def write_dataset(path: Path, args, script: str, data: dict, about: dict, packages: tuple[str, ...]) -> None:
    """Cut `data` to whole episodes within --transitions, add the metadata, and write it to `path`.

    `final_...` arrays have a row per episode, the others one per transition. `about` is what only the collector knows.
    """
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    episodes = int((ends < args.transitions).sum())
    if not episodes:
        fail(f"--transitions is {args.transitions}, less than one episode")
    rows = ends[episodes - 1] + 1
    data = {name: column[: episodes if name.startswith("final_") else rows] for name, column in data.items()}
    found = statistics(data["rewards"], data["terminals"] | data["timeouts"], data["observations"].shape[1])
    references = ROOT / "data" / "policies" / args.env / "references.json"
    measured = json.loads(references.read_text()) if references.exists() else {}
    metadata = {
        "schema_version": "1",
        **{name: getattr(args, name) for name in ("env", "quality", "seed")},
        "command": command(script, args),
        **found,
        **{name: x for name, x in measured.items() if name.startswith(("random_return", "expert_return"))},
        **about,
        "versions": {package: version(package) for package in packages},
    }
    save(path, data, metadata)
    mean, std = (found[f"episode_return_{name}"] for name in ("mean", "std"))
    print(f"{path}: {rows:,} transitions, {episodes:,} episodes, {path.stat().st_size / 1e6:.1f} MB")
    print(f"return per agent and episode: {mean:.1f}, standard deviation {std:.1f}")
