"""Kill runs, break datasets and run folders, and see that the scripts keep what they promise.

    python tests/campaign.py                                       # some minutes on one core
    python tests/campaign.py --kills 2 --datasets 0 --runs 0       # killed runs only

Killed runs: SIGKILL at random moments, also twice, at every line that writes and after every iteration, those of the
causal model too, and the signals that ask to stop. Resumed, a run must end with the same weights, optimizers and
metrics, bit for bit, as one that nothing stopped.
Broken datasets: a script trains with finite numbers, or says one sentence and exits with status 2. What it refuses,
`data/convert.py --check` calls wrong. Broken run folders: a script says one sentence, or goes on as if nothing was.

Every case runs in a fork of this process, because importing torch takes longer than the case. The cases depend on
--seed alone, but for the moments of the random kills.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the forks inherit no threads

import io
import json
import math
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import toy
import tqdm
import tyro
from torch.utils import tensorboard  # noqa: F401  the scripts import it

tqdm.tqdm.monitor_interval = 0  # a thread, which forks do not survive
tqdm.tqdm.set_lock(threading.RLock())  # by default one for all processes, which a killed one would keep
torch.optim.Adam([torch.zeros(1)])  # imports the greater part of torch
sys.path.insert(0, str(toy.ROOT))

SHORT = ["--no-cuda", "--batch-size", 8, "--hidden-dim", 8, "--eval-episodes", 1, "--final-episodes", 2]
SHORT += ["--causal-iterations", 6]
TRAINING = ["--total-iterations", 12, "--eval-interval", 4]
ITERATIONS = 6 + 12
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
SECONDS, MEGABYTES = 60, 2000  # what no case may exceed


@dataclass
class Args:
    kills: int = 20  # random moments to kill each script at, beside every line that writes
    datasets: int = 250  # broken datasets
    runs: int = 60  # broken run folders
    seed: int = 1
    short: bool = False  # every line that writes once, not once for each script


# ---- a script in a fork ----


@dataclass
class Result:
    status: int  # of the exit, or minus the signal's number
    stdout: str
    stderr: str
    seconds: float
    megabytes: float

    @property
    def told(self) -> list[str]:
        """The lines on stderr that are no progress bar."""
        lines = self.stderr.replace("\r", "\n").splitlines()
        return [line.strip() for line in lines if line.strip() and not re.search(r"(it|B|k)/s\]", line)]

    def fault(self, script: str) -> str:
        """What no case may do; "" if it is as promised."""
        if self.status == -signal.SIGALRM:
            return f"took more than {SECONDS} s"
        if self.megabytes > MEGABYTES:
            return f"took {self.megabytes:.0f} MB"
        if self.status not in (0, 2):
            return f"ended with status {self.status}: {self.stderr[-800:]}"
        wanted = [line for line in self.told if line.startswith(f"{script}.py: ")] if self.status else []
        return "" if self.told == wanted and len(wanted) == (self.status == 2) else f"said: {self.stderr[-800:]}"


def call(script: str, folder: Path, *flags, prepare: Callable = lambda: None, after: tuple = ()) -> Result:
    """`python SCRIPT FLAGS` in `folder`, after `prepare()`. `after`: pairs of seconds and a signal to send then."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the fork from its first moment
        begin, child = time.monotonic(), os.fork()
        if child:
            signal.signal(signal.SIGINT, handler)
        else:
            status = 1
            try:
                for number, file in ((1, stdout), (2, stderr)):
                    os.dup2(file.fileno(), number)
                sys.stdout, sys.stderr = (io.TextIOWrapper(open(n, "wb"), write_through=n == 2) for n in (1, 2))
                resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(SECONDS)
                tqdm.tqdm._instances.clear()  # our own bar
                os.chdir(folder)
                sys.argv = [f"{script}.py", *map(str, flags)]
                prepare()
                runpy.run_path(str(toy.ROOT / f"{script}.py"), run_name="__main__")
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        for seconds, number in after:
            time.sleep(max(0.0, begin + seconds - time.monotonic()))
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(child, number)
        _, status, usage = os.wait4(child, 0)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        seconds = time.monotonic() - begin
        return Result(os.waitstatus_to_exitcode(status), *texts, seconds, usage.ru_maxrss / 1024)


class Failed(Exception):
    """A case that did not end as it should."""


def expect(condition: object, message: str) -> None:
    if not condition:
        raise Failed(message)


@dataclass
class Report:
    """How often each part had each outcome, and what failed."""

    count: Counter
    failures: list[str]

    def cases(self, part: str, function: Callable[..., str], cases: list[tuple]) -> None:
        """Run all cases of a part, with a progress bar."""
        for number, case in enumerate(tqdm.tqdm(cases, part)):
            try:
                outcome = function(*case)
            except Exception as error:  # also of a file that cannot be read
                outcome = "FAILED"
                self.failures.append(f"{part}, case {number}: {error if isinstance(error, Failed) else repr(error)}")
            self.count[part, outcome] += 1


# ---- datasets ----


def arrays_of(discrete: bool, transitions: int = 100, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of a dataset on the toy task, with states; what follows an episode is in final_*."""
    arrays = toy.record(toy.Matching(discrete), transitions, seed)
    ends = arrays["terminals"] | arrays["timeouts"]
    for name in [name for name in arrays if name.startswith("next_")]:
        arrays[name.replace("next_", "final_")] = arrays.pop(name)[ends]
    return {**arrays, "states": arrays["observations"].reshape(transitions, -1).repeat(3, axis=1)}


def about(discrete: bool) -> dict:
    """The metadata of such a dataset."""
    env = f"toy:matching{'_discrete' if discrete else ''}"
    references = {"random_return": -5.0, "expert_return": 5.0}
    return {"schema_version": "1", "env": env, "quality": "mine", "state_owner": [0] * 6 + [1] * 6, **references}


def member(array: np.ndarray, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def pack(members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """An .npz file whose bytes depend on nothing but these."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content, kind)
    return buffer.getvalue()


def dataset(path: Path, discrete: bool = False, transitions: int = 100, seed: int = 0) -> Path:
    """A healthy file."""
    arrays = arrays_of(discrete, transitions, seed)
    members = {f"{name}.npy": member(array) for name, array in arrays.items()}
    path.write_bytes(pack(members | {"metadata.npy": member(np.array(json.dumps(about(discrete))))}))
    return path


# ---- killed runs ----


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(number: int, moment: str) -> Callable[[], None]:
    """SIGKILL at the n-th file that is written: before it, half way, when it lies beside the old one, in its place."""

    def prepare() -> None:
        write, replace, count = Path.write_bytes, Path.replace, []

        def write_bytes(path, content):
            count.append(path)
            if len(count) == number and moment == "before":
                die()
            if len(count) == number and moment == "half":
                write(path, content[: len(content) // 2])
                die()
            return write(path, content)

        def replaced(path, target):
            if len(count) == number and moment == "beside":
                die()
            replace(path, target)
            if len(count) == number and moment == "after":
                die()

        Path.write_bytes, Path.replace = write_bytes, replaced

    return prepare


def kill_after(number: int) -> Callable[[], None]:
    """SIGKILL after so many iterations, those of the causal model first."""

    def prepare() -> None:
        update, count = tqdm.tqdm.update, []

        def updated(self, *arguments):
            count.append(arguments)
            if len(count) == number:
                die()
            return update(self, *arguments)

        tqdm.tqdm.update = updated

    return prepare


def load(run: Path) -> dict:
    """A checkpoint without the two arguments that say how the last process was called."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    return checkpoint | {"args": {**checkpoint["args"], "resume": "", "cuda": False}}


def difference(one, other, where: str = "") -> str:
    """The first place at which two checkpoints are not the same, bit for bit; "" if there is none."""
    if isinstance(one, dict | list) and isinstance(other, type(one)) and len(one) == len(other):
        if isinstance(one, dict) and one.keys() != other.keys():
            return where
        keys = one if isinstance(one, dict) else range(len(one))
        return next((found for key in keys if (found := difference(one[key], other[key], f"{where}/{key}"))), "")
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return "" if same and one.numpy().tobytes() == other.numpy().tobytes() else where
    return "" if one == other else where


def check_same(run: Path, whole: Path) -> None:
    """`run` ended as `whole` did, and nothing lies about."""
    expect(not (found := difference(load(run), load(whole))), f"{run}: {found} differs from a run that nothing stopped")
    same = (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    expect(same, f"{run}: metrics.csv differs from a run that nothing stopped")
    expect(json.loads((run / "config.json").read_text()), f"{run}: config.json is empty")
    expect(not list(run.glob("*.tmp")), f"{run} keeps a temporary file")


def check_whole(run: Path, whole: Path) -> None:
    """Right after a kill every file that is there can be read."""
    if (run / "config.json").exists():
        json.loads((run / "config.json").read_text())
    if (run / "checkpoint.pt").exists():
        load(run)
    if (run / "metrics.csv").exists():
        rows, text = (run / "metrics.csv").read_text(), (whole / "metrics.csv").read_text()
        expect(text.startswith(rows) and rows.endswith("\n"), f"{run}: metrics.csv is torn")


def killed_runs(args: Args, folder: Path, report: Report) -> None:
    rng, wholes, files = np.random.default_rng(args.seed), {}, 1 + 5 + 3  # config, checkpoints, rows
    flags = ["--env", "toy:matching", "--dataset", dataset(folder / "killed.npz"), *SHORT, *TRAINING]
    for script in toy.SCRIPTS:
        (folder / script).mkdir()
        result = call(script, folder / script, *flags)
        expect(not result.fault(script), f"{script}: {result.fault(script)}")
        wholes[script] = (toy.run_folder(folder / script), result.seconds)

    lines = [(n, moment) for n in range(1, files + 1) for moment in ("before", "half", "beside", "after")]
    steps = [*range(1, ITERATIONS + 1)]
    cases: list[tuple] = []
    for k, script in enumerate(toy.SCRIPTS if args.kills else []):
        whole, seconds = wholes[script]

        def moments(number: int, times: int, seconds: float = seconds) -> list[dict]:
            return [{"after": [(rng.uniform(0, seconds), number)]} for _ in range(times)]

        stops = [
            [{"prepare": kill_at(*line), "where": "a line that writes"}]
            for line in (lines[k::3] if args.short else lines)
        ]
        stops += [
            [{"prepare": kill_after(step), "where": "an iteration"}] for step in (steps[k::3] if args.short else steps)
        ]
        stops += [[stop] for stop in moments(signal.SIGKILL, args.kills)]
        stops += [moments(signal.SIGKILL, 2) for _ in range(args.kills)]
        stops += [[stop] for number in SIGNALS for stop in moments(number, -(-args.kills // 4))]
        cases += [(script, folder / f"kill{len(cases) + n}", flags, whole, stop) for n, stop in enumerate(stops)]
    report.cases("killed runs", kill, cases)


def kill(script: str, place: Path, flags: list, whole: Path, kills: list[dict]) -> str:
    """Stop a run, perhaps twice, resume it until it is finished, and compare. Returns what was stopped."""
    place.mkdir()
    name = kills[0].get("where", "a random moment")
    numbers = {number for stop in kills for _, number in stop.get("after", [])} or {signal.SIGKILL}
    command, asked = flags, numbers - {signal.SIGKILL}
    for stop in [*kills, {}]:
        result = call(script, place, *command, prepare=stop.get("prepare", lambda: None), after=stop.get("after", ()))
        runs = sorted((place / "runs").glob("*"), key=lambda run: run.stat().st_mtime_ns)
        for run in runs:
            check_whole(run, whole)
        expected = {0} if not stop else {0, -signal.SIGKILL} if not asked else {0, *(-n for n in asked)}
        if asked and "stopped at iteration" in result.stdout:
            (number,) = asked
            expected = {128 + number}
            told = f"stopped at iteration {load(runs[-1])['iteration']}; to go on: python {script}.py --resume runs/"
            expect(f"{told}{runs[-1].name}" in result.stdout, f"{place}: {result.stdout}")
        expect(result.status in expected, f"{place}: status {result.status}: {result.stderr[-800:]}")
        expect("prepare" not in stop or result.status, f"{place}: nothing was written there")
        expect("Traceback" not in result.stderr, result.stderr[-800:])
        if runs and (runs[-1] / "checkpoint.pt").exists():
            command = ["--resume", runs[-1], "--no-cuda"]
        elif runs:  # too young to be resumed
            refused = call(script, place, "--resume", runs[-1], "--no-cuda")
            expect(refused.status == 2 and not refused.fault(script), f"{place}: {refused.stderr[-800:]}")
    check_same(max((place / "runs").glob("*"), key=lambda run: (run / "checkpoint.pt").exists()), whole)
    shutil.rmtree(place)
    (number,) = numbers
    return f"{signal.Signals(number).name} at {name}{', twice' if len(kills) == 2 else ''}: the same in the end"


# ---- broken datasets ----

ELSEWHERE = ("another environment", "env = ", "'env' twice", "actions last axis cut")  # the file may be right
# What --check calls wrong and a script can train on: labels, bytes behind an array, what is never played.
HARMLESS = ("metadata: ", "bytes, which do not make", "allow an agent nothing")

Broken = tuple[dict[str, np.ndarray], dict]


def break_arrays(rng: np.random.Generator, arrays: dict[str, np.ndarray]) -> str:
    """Change an array or several. Returns what was done; with "another environment" if only that can be said."""
    name = str(rng.choice(list(arrays)))
    x, rows = arrays[name], len(arrays["rewards"])
    row = int(rng.integers(len(x))) if len(x) else 0
    entry = (row, *(int(rng.integers(n)) for n in x.shape[1:]))

    def put(value) -> None:
        arrays[name] = x.astype(np.result_type(x, type(value)) if x.dtype == bool else x.dtype)
        arrays[name][entry] = value

    def cut(length: int, end: bool) -> None:
        """The first so many rows of everything."""
        ends = (arrays["terminals"] | arrays["timeouts"])[:length]
        for key in list(arrays):
            if not key.startswith("final_"):
                arrays[key] = arrays[key][:length].copy()
            elif end and length and not ends[-1]:
                arrays[key] = np.concatenate([arrays[key][: ends.sum()], arrays[key.replace("final_", "")][:1]])
            else:
                arrays[key] = arrays[key][: ends.sum()]
        if end and length:
            arrays["timeouts"][-1] = not arrays["terminals"][-1]

    def rescale(factor: float) -> None:
        arrays.update({key: arrays[key] * np.float32(factor) for key in ("rewards", "individual_rewards")})

    kinds = ["f2", "f4", "f8", ">f4", "g", "i1", "u1", "i8", "u8", "?", "c8", "U4", "S3", "M8[s]", "m8[s]", "V4"]
    big = [np.nan, np.inf, -np.inf, 1e10, -1e10, 1e30, 9.9e8, 3e38, 1e-30, -0.0]
    deeds: dict[str, Callable] = {
        "dropped": lambda: arrays.pop(name),
        "flat": lambda: arrays.update({name: x.ravel()}),
        "one more axis": lambda: arrays.update({name: x[..., None]}),
        "a row of one": lambda: arrays.update({name: x[None]}),
        "axes turned": lambda: arrays.update({name: x.T}),
        "no number": lambda: arrays.update({name: x.flat[0]}),
        "by columns": lambda: arrays.update({name: np.asfortranarray(x)}),
        "last axis cut": lambda: arrays.update({name: x[..., :-1]}),
        "one row less": lambda: arrays.update({name: x[:-1]}),
        "one row more": lambda: arrays.update({name: np.concatenate([x, x[-1:]])}),
        "no rows": lambda: arrays.update({name: x[:0]}),
        "another kind": lambda: arrays.update({name: np.zeros(x.shape, rng.choice(kinds))}),
        "cast": lambda: arrays.update({name: x.astype(rng.choice(kinds[:10]))}),
        "an absurd number": lambda: (
            put(float(rng.choice(big))) if x.dtype.kind == "f" else put(int(rng.choice([9, -9])))
        ),
        "absurd throughout": lambda: arrays.update({name: x * rng.choice([1e-40, 1e-20, 1e6, 1e9, 1e20])}),
        "1e300": lambda: arrays.update({name: np.full(x.shape, 1e300)}),
        "constant": lambda: arrays.update({name: np.full(x.shape, x.flat[0])}),
        "zero": lambda: arrays.update({name: np.zeros_like(x)}),
        "permuted": lambda: arrays.update({name: rng.permutation(x)}),
        "noise": lambda: arrays.update({name: rng.normal(size=x.shape).astype(np.float32)}),
        "turned around": lambda: arrays.update({name: ~x if x.dtype == bool else -x}),
        "all rows permuted": lambda: arrays.update({key: rng.permutation(v) for key, v in arrays.items()}),
        "few rows": lambda: cut(int(rng.integers(12)), True),
        "rows cut off": lambda: cut(int(rng.integers(12, rows)), False),
        "rewards of another scale": lambda: rescale(float(rng.choice([1e-30, 1e-12, 1e-3, 1e3, 1e8, 1e20]))),
        "ends moved": lambda: arrays.update({"timeouts": rng.random(rows) < rng.choice([0.01, 0.2, 0.9])}),
        "ends and their observations": lambda: break_ends(rng, arrays),
        "both ends": lambda: arrays.update({"terminals": arrays["timeouts"].copy()}),
        "terminals": lambda: arrays.update({"terminals": arrays["timeouts"], "timeouts": arrays["terminals"]}),
        "no ends": lambda: arrays.update({"timeouts": np.zeros(rows, bool)}),
        "next beside final": lambda: arrays.update({"next_observations": np.roll(arrays["observations"], -1, 0)}),
        "no individual rewards": lambda: arrays.pop("individual_rewards"),
        "no states": lambda: arrays.pop("states"),
        "no masks": lambda: [arrays.pop(key) for key in list(arrays) if "masks" in key],
        "another environment: three agents": lambda: arrays.update(
            {key: v[:, [0, 1, 1]] for key, v in arrays.items() if v.ndim > 1 and key != "states"}
            | {"individual_rewards": np.stack([arrays["rewards"] / 3] * 3, axis=1)}
        ),
        "another environment: wide": lambda: arrays.update(
            {key: np.concatenate([v, v], axis=2) for key, v in arrays.items() if key.endswith("observations")}
        ),
    }
    weights = np.array([5.0 if name == "an absurd number" else 1.0 for name in deeds])
    deed = str(rng.choice(list(deeds), p=weights / weights.sum()))
    deeds[deed]()
    return deed if deed.startswith("another") else f"{name} {deed}"


def break_ends(rng: np.random.Generator, arrays: dict[str, np.ndarray]) -> None:
    """Other episodes, down to one row each, with as many final observations and masks."""
    ends = rng.random(len(arrays["rewards"])) < rng.choice([0.05, 0.5, 1.0])
    ends[-1] = True
    kind = rng.choice(["terminals", "timeouts"])
    other = "timeouts" if kind == "terminals" else "terminals"
    arrays |= {kind: ends, other: np.zeros_like(ends)}
    arrays |= {f"final_{key}": arrays[key][ends] for key in ("observations", "action_masks") if key in arrays}


def break_metadata(rng: np.random.Generator, metadata: dict) -> tuple[str, str]:
    """(what was done, the text)."""
    values = [
        None,
        True,
        "",
        "abc",
        3,
        -1,
        0.5,
        [],
        [[]],
        {},
        [None],
        10**400,
        -(10**400),
        1e300,
        float("nan"),
        "x" * 9999,
    ]
    values += [float("inf"), [0] * 12, [1.0] * 12, [0] * 11 + [10**400], ["0"] * 12, [2] * 12, list(range(12))]
    key = str(rng.choice(["state_owner", "random_return", "expert_return", "env", "schema_version", "quality", "new"]))
    index = int(rng.integers(len(values)))
    text, deep = json.dumps({**metadata, key: values[index]}), int(rng.integers(3000, 100_000))
    texts = {
        f"{key} = {str(values[index])[:20]}": text,
        f"without {key}": json.dumps({name: value for name, value in metadata.items() if name != key}),
        "nested lists": text[:-1] + ', "deep": ' + "[" * deep + "]" * deep + "}",
        "nested objects": '{"a":' * deep + "1" + "}" * deep,
        "400 digits": text[:-1] + ', "random_return": ' + "7" * 400 + "}",
        "5,000 digits": text[:-1] + ', "other": ' + "7" * 5000 + "}",
        "no JSON": text[:-3],
        "a list": json.dumps([text]),
        "a number": "3",
        "nothing": "",
        "a megabyte": json.dumps({**metadata, "long": "x" * 2**20}),
        "zero characters": text.replace(",", "\0,"),
        "'env' twice": text[:-1] + ', "env": 3, "env": "toy:matching"}',
    }
    deed = str(rng.choice(list(texts), p=[0.46] + [0.045] * 12))
    return deed, texts[deed]


def break_header(rng: np.random.Generator, content: bytes) -> tuple[str, bytes]:
    """Replace the header of an array."""
    length = int.from_bytes(content[8:10], "little")
    header, rest = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    shape = header[header.index("(") : header.index(")") + 1]
    kind = header.split("'")[3]
    other = str(
        rng.choice(["<f2", "<f8", ">f4", "|O", "<i4", "|b1", "|u1", "<U1000", "<f3", "", "<M8[s]", "|V0", "<c8"])
    )
    headers = {
        "10^12 rows": header.replace(shape, "(1000000000000,)"),
        "10^9 rows": header.replace(shape, "(1000000000, 2, 2)"),
        "10^30 rows": header.replace(shape, "(10" + "0" * 30 + ",)"),
        "negative": header.replace(shape, "(-1, 2, 2)"),
        "fewer rows": header.replace(shape, shape.replace("100", "10 ", 1)),
        "fewer columns": header.replace(shape, shape.replace("12", "1 ").replace(" 2)", " 1)")),
        "a word": header.replace(shape, "'abc'"),
        "nested": header.replace(shape, "(" * 300 + ")" * 300),
        "by columns": header.replace("False", "True"),
        f"kind {other}": header.replace(f"'{kind}'", f"'{other}'"),
        "no header": "",
        "code": "__import__('os').system('touch /tmp/pwned')",
    }
    deed = str(rng.choice(list(headers)))
    new = headers[deed].encode("latin1")
    return f"header: {deed}", content[:8] + len(new).to_bytes(2, "little") + new + rest


def break_dataset(seed: int, number: int, path: Path) -> tuple[bool, str]:
    """Write the broken dataset of this number. Returns whether it is discrete, and what is broken."""
    rng = np.random.default_rng([seed, number])
    discrete = bool(number % 2)
    arrays, metadata, deeds = arrays_of(discrete), about(discrete), []
    if rng.random() < 0.3:  # as old files have it
        ends = arrays["timeouts"]
        for key in [key for key in arrays if key.startswith("final_")]:
            final, name = arrays.pop(key), key.removeprefix("final_")
            arrays[f"next_{name}"] = np.roll(arrays[name], -1, axis=0)
            arrays[f"next_{name}"][ends] = final
    what = str(rng.choice(["arrays", "two arrays", "metadata", "header", "file"], p=[0.4, 0.1, 0.15, 0.1, 0.25]))
    for _ in range({"arrays": 1, "two arrays": 2}.get(what, 0)):
        try:
            deeds.append(break_arrays(rng, arrays))
        except (KeyError, IndexError, ValueError, TypeError):  # does not go with what was broken before
            deeds.append("nothing more")
    text = json.dumps(metadata)
    if what == "metadata":
        deed, text = break_metadata(rng, metadata)
        deeds.append(f"metadata: {deed}")
    with np.errstate(all="ignore"):
        members = {f"{name}.npy": member(np.asarray(array)) for name, array in arrays.items()}
    members["metadata.npy"] = member(np.array(text))
    name = str(rng.choice(list(members)))
    if what == "header":
        deed, members[name] = break_header(rng, members[name])
        deeds.append(f"{name} {deed}")
    kind = int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    content = pack(members, kind)
    if what == "file":
        deed, content = break_file(rng, content, members, name)
        deeds.append(f"file: {deed}")
    path.write_bytes(content)
    return discrete, "; ".join(deeds)


def break_file(rng: np.random.Generator, content: bytes, members: dict[str, bytes], name: str) -> tuple[str, bytes]:
    def flipped(share: float = 0.0) -> bytes:
        """Some bits, or a part of the bytes, replaced."""
        damaged = bytearray(content)
        for _ in range(int(rng.integers(1, 4)) if not share else int(share * len(damaged))):
            damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
        return bytes(damaged)

    def method(number: int) -> bytes:
        """Another compression method in every header of the zip."""
        damaged = bytearray(content)
        for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            place = damaged.find(mark)
            while place >= 0:
                damaged[place + offset : place + offset + 2] = number.to_bytes(2, "little")
                place = damaged.find(mark, place + 4)
        return bytes(damaged)

    def encrypted() -> bytes:
        damaged, place = bytearray(content), content.find(b"PK\x01\x02")
        while place >= 0:
            damaged[place + 8] |= 1
            place = damaged.find(b"PK\x01\x02", place + 4)
        return bytes(damaged)

    begin, objects = int(rng.integers(len(content))), member(np.array([{"a": 1}], object), pickled=True)
    deeds: dict[str, Callable[[], bytes]] = {
        "flipped bits": flipped,
        "flipped bits ": flipped,
        "flipped bits in the directory": lambda: content[:-900] + damage(rng, content[-900:]),
        "a thousandth flipped": lambda: flipped(0.001),
        "cut off": lambda: content[:begin],
        "beginning cut off": lambda: content[begin:],
        "zeros": lambda: content[:begin] + bytes(len(content[begin : begin + 400])) + content[begin + 400 :],
        "doubled": lambda: content + content,
        "something behind": lambda: content + b"something else" * 9,
        "something before": lambda: b"something else" * 9 + content,
        "empty": lambda: b"",
        "text": lambda: b"these are not the arrays that you are looking for",
        "an array": lambda: members["rewards.npy"],
        "a README": lambda: pack({**members, "README": b"read me", "__MACOSX/._rewards.npy": b"junk"}),
        "an object array beside": lambda: pack({**members, "infos.npy": objects}),
        "an object array": lambda: pack({**members, name: objects}),
        "an empty member": lambda: pack({**members, name: b""}),
        "a text member": lambda: pack({**members, name: b"no array"}),
        "a member cut off": lambda: pack({**members, name: members[name][: len(members[name]) // 2]}),
        "a member too long": lambda: pack({**members, name: members[name] + bytes(64)}),
        "compression 99": lambda: method(99),
        "compression 8": lambda: method(8),
        "LZMA": lambda: pack(members, zipfile.ZIP_LZMA),
        "encrypted": encrypted,
        "no members": lambda: pack({}),
        "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + content,
    }
    deed = str(rng.choice(list(deeds)))
    return deed.strip(), deeds[deed]()


def damage(rng: np.random.Generator, content: bytes) -> bytes:
    damaged = bytearray(content)
    damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def broken_datasets(args: Args, folder: Path, report: Report) -> None:
    report.cases("broken datasets", train, [(args.seed, n, folder / f"data{n}") for n in range(args.datasets)])


def train(seed: int, number: int, place: Path) -> str:
    """Train on a broken dataset and check the file. Returns how it ended."""
    place.mkdir()
    discrete, what = break_dataset(seed, number, place / "broken.npz")
    script = toy.SCRIPTS[number % 3]
    env = f"toy:matching{'_discrete' if discrete else ''}"
    flags = ["--env", env, "--dataset", place / "broken.npz", *SHORT, "--total-iterations", 6, "--eval-interval", 3]
    result, check = call(script, place, *flags), call("data/convert", place, "--check", place / "broken.npz")
    case = f"{script}, {what}"
    expect(not (fault := result.fault(script)), f"{case}: {fault}")
    fine = check.status in (0, 2) and not check.told and check.megabytes < MEGABYTES
    expect(fine, f"{case}: --check ended with {check.status}: {check.stderr[-800:]}")
    lines = [line.split(": ", 1)[1] for line in check.stdout.splitlines()]
    wrong = [line for line in lines if not line.startswith(("doubtful: ", "not read: ", "nothing wrong"))]
    verdict = "called wrong" if wrong else "not called wrong"
    runs = [toy.run_folder(place)] if (place / "runs").exists() else []
    if result.status == 0:
        with open(runs[0] / "metrics.csv") as file:
            numbers = [float(number) for line in [*file][1:] for number in line.split(",") if number.strip()]
        tensors = [x for part in load(runs[0]).values() for x in leaves(part)]
        expect(all(map(math.isfinite, numbers)), f"{case}: metrics.csv holds {numbers}")
        expect(all(x.isfinite().all() for x in tensors), f"{case}: the checkpoint holds NaN or infinity")
        harmless = all(any(word in line for word in HARMLESS) for line in wrong)
        expect(harmless, f"{case}: trained on what --check calls wrong: {wrong}")
        return f"trained, {verdict} by --check"
    elsewhere = "--env" in result.told[-1] and any(word in what for word in ELSEWHERE)
    unfit = script == "macca_icq" and "no row has a next action" in result.told[-1]  # the others can use it
    expect(wrong or elsewhere or unfit, f"{case}: refused, but not by --check: {result.told[-1]}")
    verdict = verdict if wrong else "rightly " + verdict
    expect(not runs, f"{case}: refused only when training had begun: {result.told[-1]}")
    return f"refused, {verdict} by --check"


def leaves(part) -> list[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        return [part]
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return [x for one in parts for x in leaves(one)]


# ---- broken run folders ----


def broken_runs(args: Args, folder: Path, report: Report) -> None:
    flags = ["--env", "toy:matching", *SHORT, *TRAINING, "--dataset"]
    path, other = dataset(folder / "runs.npz"), dataset(folder / "other.npz", seed=3)
    good: dict[tuple[str, str], Path] = {}
    for script in toy.SCRIPTS:
        for name, stop, data in (
            ("whole", {}, path),
            ("young", {"prepare": kill_at(7, "before")}, path),
            ("other", {}, other),
        ):
            place = folder / f"{name}-{script}"
            place.mkdir()
            call(script, place, *flags, data, **stop)
            good[name, script] = toy.run_folder(place)
    cases = [(args.seed, number, folder / f"run{number}", good) for number in range(args.runs)]
    report.cases("broken run folders", resume, cases)


def resume(seed: int, number: int, run: Path, good: dict[tuple[str, str], Path]) -> str:
    """Break a run folder and resume the run. Returns how it ended."""
    rng, script = np.random.default_rng([seed, number]), toy.SCRIPTS[number % 3]
    shutil.copytree(good[str(rng.choice(["whole", "young"])), script], run)
    what = break_run(rng, run, good, script)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    result = call(script, run.parent, "--resume", run, "--no-cuda")
    expect(not (fault := result.fault(script)), f"{script}, {what}: {fault}")
    if result.status == 0:
        expect(not what.startswith(("damaged", "blocked")), f"{script}, {what}: went on")
        if "config" in what:  # nobody reads it, and nobody writes it again
            shutil.copy(good["whole", script] / "config.json", run)
        check_same(run, good["whole", script])
        return "went on as if nothing was"
    after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and ".tfevents." not in file.name}
    same = all(before.get(file) == content for file, content in after.items())
    expect(same or what.startswith("blocked"), f"{script}, {what}: a run that cannot be resumed was changed")
    return "refused"


def break_run(rng: np.random.Generator, run: Path, good: dict, script: str) -> str:
    """Break a run folder. Returns what was done; "damaged" or "blocked" before it: it must not go on."""
    path = run / "checkpoint.pt"
    content = path.read_bytes()
    begin = int(rng.integers(len(content)))
    stored = torch.load(path, weights_only=True)
    stranger = toy.SCRIPTS[(toy.SCRIPTS.index(script) + 1) % 3]
    key = str(rng.choice(list(stored)))
    edited = {
        "a word": {**stored, key: "word"},
        "nothing": {**stored, key: None},
        "left out": {name: value for name, value in stored.items() if name != key},
        "iteration": {**stored, "iteration": 7},
        "credit": {**stored, "args": {**stored["args"], "credit": "maccca"}},
        "tensors": {
            **stored,
            "nets": {name: x * 2 if x.is_floating_point() else x for name, x in stored["nets"].items()},
        },
    }
    edit = str(rng.choice(list(edited)))
    garbage = [b"", b"{}", b"[]", b"not JSON", b"\xff\xfe\x00", b'{"args": 3}', rng.bytes(200), b"[" * 5000]

    def resave() -> None:
        torch.save(edited[edit], path)

    def fill(name: str) -> None:
        (run / name).write_bytes(garbage[int(rng.integers(len(garbage)))])

    def make_folder(name: str) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    deeds: dict[str, Callable] = {
        "damaged: a flipped bit": lambda: path.write_bytes(damage(rng, content)),
        "damaged: a flipped bit at the end": lambda: path.write_bytes(content[:-32] + damage(rng, content[-32:])),
        "damaged: cut off": lambda: path.write_bytes(content[:begin]),
        "damaged: the last byte is missing": lambda: path.write_bytes(content[:-1]),
        "damaged: something behind": lambda: path.write_bytes(content + b"x"),
        "damaged: zeros": lambda: path.write_bytes(content[:begin] + bytes(len(content) - begin)),
        "damaged: empty": lambda: path.write_bytes(b""),
        "damaged: text": lambda: path.write_text("no checkpoint"),
        "damaged: no checkpoint": path.unlink,
        "damaged: a folder for a checkpoint": lambda: make_folder("checkpoint.pt"),
        "damaged: of another script": lambda: shutil.copy(good["whole", stranger] / "checkpoint.pt", path),
        "damaged: no folder": lambda: shutil.rmtree(run),
        "damaged: a file for a folder": lambda: (shutil.rmtree(run), run.write_text("no folder")),
        f"damaged: saved again with {edit} {key}": resave,
        f"damaged: saved again with {edit} {key} ": resave,
        "blocked: a folder for metrics.csv": lambda: make_folder("metrics.csv"),
        "blocked: a folder for a temporary file": lambda: make_folder("checkpoint.tmp"),
        "no config": lambda: (run / "config.json").unlink(),
        "config is garbage": lambda: fill("config.json"),
        "no metrics": lambda: (run / "metrics.csv").unlink(),
        "metrics are garbage": lambda: fill("metrics.csv"),
        "no events": lambda: [file.unlink() for file in run.glob("events*")],
        "events are garbage": lambda: [file.write_bytes(b"garbage") for file in run.glob("events*")],
        "torn temporary files": lambda: [(run / f"{n}.tmp").write_bytes(b"torn") for n in ("checkpoint", "metrics")],
        "something else in it": lambda: make_folder("extra"),
    }
    deed = str(rng.choice(list(deeds)))
    deeds[deed]()
    return deed.strip()


# ---- everything ----


def main(args: Args) -> int:
    """Run everything and print a table. Returns the number of failures."""
    report, begin = Report(Counter(), []), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        for part in (killed_runs, broken_datasets, broken_runs):
            part(args, Path(name).resolve(), report)
    for (part, outcome), number in sorted(report.count.items()):
        print(f"{part:<20} {outcome:<60} {number:>4}")
    for failure in report.failures:
        print(f"FAILED: {failure}")
    print(f"{report.count.total()} cases in {time.monotonic() - begin:.0f} s, {len(report.failures)} failed")
    return len(report.failures)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args, description=__doc__)) > 0)
