"""Turn a file of ours into other people's formats (data/README.md). `data/convert.py` reads both back.

    python data/export.py FILE --to minari --output NAME-v0    # read by minari.MinariDataset("NAME-v0/data")
    python data/export.py FILE --to vault --output NAME.vlt    # by flashbax's Vault("NAME.vlt", vault_uid=QUALITY, ...)

Episodes are read and written one after the other, so a file may be larger than memory.
"""

import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the package `data` is
from data import files
from data.check import KINDS, LAYOUT, Archive, Rows, flags, inspect
from data.files import fail

STEPS, LONGEST = 4096, 10**13  # of a vault's pieces, and what it claims to be long


@dataclass
class Args:
    source: tyro.conf.Positional[Path]  # the file to export
    to: Literal["minari", "vault"]  # the format
    output: Path  # the folder to write


class Dataset:
    """Our file, episode by episode."""

    def __init__(self, path: Path):
        archive = Archive(path)
        self.arrays = {name: Rows(archive[name]) for name in LAYOUT if name in archive}
        self.metadata = files.read_metadata(path)
        length = self.arrays["rewards"].length
        self.terminals = flags(self.arrays["terminals"], length)
        self.ends = np.flatnonzero(self.terminals | flags(self.arrays["timeouts"], length))
        self.agents = self.arrays["observations"].shape[0]
        self.discrete = not self.arrays["actions"].shape[1:]

    def episodes(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays [L, ...] of each; `observations` and `action_masks` have a row more, for what followed."""
        for number, (start, stop) in enumerate(itertools.pairwise([0, *(self.ends + 1).tolist()])):
            names = [name for name in self.arrays if not name.startswith(("next_", "final_"))]
            found = {name: self.arrays[name](start, stop) for name in names}
            kinds = {name: KINDS[LAYOUT[name][0]][1] for name in names}
            if self.discrete:
                kinds["actions"] = np.int64
            for name in [name for name in ("observations", "action_masks") if name in found]:
                if f"final_{name}" in self.arrays:
                    final = self.arrays[f"final_{name}"](number, number + 1)
                else:
                    final = self.arrays[f"next_{name}"](stop - 1, stop)
                found[name] = np.concatenate([found[name], final])
            yield {name: array.astype(kinds[name]) for name, array in found.items()}


def box(low: float, high: float, *shape: int) -> dict[str, Any]:
    """Minari's text of a gymnasium.spaces.Box."""
    bounds = {"low": np.full(shape, low).tolist(), "high": np.full(shape, high).tolist()}
    return {"type": "Box", "dtype": "float32", "shape": list(shape), **bounds}


def write_minari(data: Dataset, folder: Path) -> None:
    """A group per episode. The second axis of arrays is the agent; what Minari has no place for is in `infos`."""
    h5py = files.need("h5py")
    names = {"terminals": "terminations", "timeouts": "truncations", "action_masks": "infos/action_mask"}
    names |= {"states": "infos/state"} | {name: f"infos/{name}" for name in ("individual_rewards", "shapley_rewards")}
    highest = 0
    (folder / "data").mkdir()
    with h5py.File(folder / "data" / "main_data.hdf5", "w", track_order=True) as file:
        for number, episode in enumerate(data.episodes()):
            group = file.create_group(f"episode_{number}")
            group.attrs.update({"id": number, "total_steps": len(episode["rewards"])})
            for name, array in episode.items():
                group.create_dataset(names.get(name, name), data=array)
            highest = max(highest, episode["actions"].max())
    if data.discrete:
        masks = data.arrays.get("action_masks")
        choices = masks.shape[1] if masks else int(highest) + 1
        actions = {"type": "MultiDiscrete", "dtype": "int64", "nvec": [choices] * data.agents}
        actions["start"] = [0] * data.agents
    else:
        actions = box(-1.0, 1.0, *data.arrays["actions"].shape)
    env, quality = (re.sub(r"[^\w/-]+", "_", str(data.metadata.get(name))) for name in ("env", "quality"))
    metadata = {
        "dataset_id": f"{env}/{quality}-v0",
        "minari_version": "0.5.4",
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "total_episodes": len(data.ends),
        "total_steps": data.arrays["rewards"].length,
        "observation_space": json.dumps(box(-math.inf, math.inf, *data.arrays["observations"].shape)),
        "action_space": json.dumps(actions),
        "description": json.dumps(data.metadata),
    }
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata))


def write_vault(data: Dataset, folder: Path) -> None:
    """All episodes in one sequence, with flags and rewards for each agent.

    A vault has no place for what followed the last step of an episode. After a time limit the bootstrap needs it. So it
    becomes a step of its own, with an allowed action and reward 0, and that step is the truncated one.
    """
    ts = files.need("tensorstore")
    names = {"timeouts": "truncations", "action_masks": "infos.legals", "states": "infos.state"}
    names["shapley_rewards"] = "infos.shapley_rewards"
    folder = folder / re.sub(r"\W+", "_", str(data.metadata.get("quality")))
    folder.mkdir()
    stores: dict[str, Any] = {}
    steps = 0

    def create(name: str, dtype: Any, shape: list[int], chunks: list[int]) -> Any:
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}, "path": name}
        layout = {"chunks": chunks, "compressor": {"id": "gzip", "level": 5}}
        spec = {"driver": "zarr", "kvstore": store, "metadata": layout, "create": True}
        return ts.open(spec, dtype=dtype, shape=shape).result()

    def write(rows: dict[str, np.ndarray]) -> None:
        for name, array in rows.items():
            if name not in stores:
                shape = array.shape[1:]
                stores[name] = create(f"{name}.", array.dtype, [1, LONGEST, *shape], [1, STEPS, *shape])
            stores[name][0, steps : steps + len(array)].write(array).result()

    def with_final_step(episode: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        over, length = episode["terminals"][-1], len(episode["rewards"])
        own = episode.pop("individual_rewards", episode["rewards"][:, None])
        rows = {name: np.concatenate([x, x[-1:]])[: length + 1] for name, x in episode.items()}
        if data.discrete:
            rows["actions"][-1] = episode["action_masks"][-1].argmax(axis=1) if "action_masks" in episode else 0
        rows["rewards"] = np.broadcast_to(np.concatenate([own, 0 * own[-1:]]), (length + 1, data.agents))
        if "shapley_rewards" in rows:
            rows["shapley_rewards"][length:] = 0
        rows["timeouts"][-2] = False
        for name in ("terminals", "timeouts"):
            rows[name] = np.repeat(rows[name][:, None], data.agents, axis=1)
        return {names.get(name, name): x[: length + (not over)] for name, x in rows.items()}

    episodes = map(with_final_step, data.episodes())
    while part := list(itertools.islice(episodes, 100)):
        rows = {name: np.concatenate([episode[name] for episode in part]) for name in part[0]}
        write(rows)
        steps += len(rows["rewards"])
    create("vault_index", np.int32, [1], [1]).write(np.array([steps], np.int32)).result()
    shapes: dict[str, Any] = {"infos": {}}
    kinds: dict[str, Any] = {"infos": {}}
    for name, store in stores.items():
        place = name.removeprefix("infos.")
        where = (shapes, kinds) if place == name else (shapes["infos"], kinds["infos"])
        where[0][place], where[1][place] = str((1, steps, *store.shape[2:])), store.dtype.numpy_dtype.name
    (folder / "metadata.json").write_text(
        json.dumps({"version": 1.2, "structure_shape": shapes, "structure_dtype": kinds, "source": data.metadata})
    )


def main(args: Args) -> None:
    if not args.source.is_file():
        fail(f"{args.source} is not a file")
    if args.output.exists():
        fail(f"{args.output} exists; choose another --output")
    with np.errstate(over="ignore", invalid="ignore"):  # the check finds what comes of it
        if wrong := inspect(args.source).wrong:
            fail(f"{args.source} cannot be exported: {'; '.join(wrong)}")
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        {"minari": write_minari, "vault": write_vault}[args.to](Dataset(args.source), temporary)
        temporary.rename(args.output)
    except OSError as error:
        fail(f"{args.output} cannot be written: {error.strerror or error}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{args.output}: {args.to}, from {args.source}")


if __name__ == "__main__":
    files.run(lambda: main(tyro.cli(Args, description=__doc__)))
