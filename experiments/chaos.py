"""Kill a run again and again: it must end with the same bits as one that nobody disturbed.

python -m experiments.chaos --kills=50 --seed=0 --workdir=runs/chaos [--config=configs/tiny.py] [--config.FIELD=VALUE]

Runs `experiments.pretrain` once in WORKDIR/straight, then the same in WORKDIR/killed, sending SIGKILL to its process
group at moments drawn from the seed and starting it again; compares checkpoints array by array and metrics record by
record. Writes WORKDIR/chaos.json; exits with 1 for any difference, and for a restart that fails by itself.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags

from dsv3.config import require
from dsv3.train.metrics import read_metrics
from experiments import launch

CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "the experiment, made small by this script's own overrides")
WORKDIR = flags.DEFINE_string("workdir", None, "a new directory for both runs", required=True)
KILLS = flags.DEFINE_integer("kills", 50, "how often", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "of the kinds and moments")

KINDS = ("data", "compile", "save", "saved", "any")
"""Aims: while data is written; before the first step is done; while a checkpoint is written; just after; any moment."""
TIMING = ("tokens_per_second", "mfu")  # fields of metrics.jsonl that no two runs share
JSON_ITEMS = ("record",)  # items of a checkpoint that hold no arrays
CHECKPOINT_EVERY = 4
POLL_SECONDS, JUST_AFTER_SECONDS = 0.002, 0.05
HUNG_SECONDS = 300


def small(corpus: Path, kills: int) -> dict[str, str]:
    """Overrides for a run of seconds, with two checkpoints a kill and every part of a real one."""
    return {
        "data.sources.0.files": str(corpus), "data.tokenizer": "bpe", "data.bpe_vocab_size": "400",
        "data.eval_bytes": "600", "data.validation_fraction": "0.2", "data.eval_stride": "16",
        "model.vocab_size": "400", "model.dim": "24", "model.inter_dim": "32", "model.n_layers": "2",
        "model.remat": "none", "model.attention.n_heads": "2", "model.attention.q_lora_rank": "16",
        "model.attention.kv_lora_rank": "16", "model.attention.qk_nope_head_dim": "8",
        "model.attention.qk_rope_head_dim": "8", "model.attention.v_head_dim": "8", "model.moe.moe_inter_dim": "16",
        "train.seq_len": "32", "train.micro_batch_size": "2", "train.batch_increment": "4",
        "train.batch_size.0.start": "4", "train.batch_size.0.end": "4",
        "train.steps": str(CHECKPOINT_EVERY * max(12, 2 * kills)), "train.log_every": "1", "train.eval_every": "25",
        "train.checkpoint_every": str(CHECKPOINT_EVERY),
    }


def write_corpus(directory: Path) -> Path:
    """Some 300 kB of Python, always the same."""
    rng = random.Random(0)
    names = ["alpha", "beta", "gamma", "delta", "value", "total", "index", "weight"]
    directory.mkdir(parents=True)
    for number in range(60):
        lines = []
        for _ in range(60):
            a, b, c = rng.choices(names, k=3)
            lines += [f"def {a}_{number}({b}, {c}):", f"    return {b} * {rng.randrange(100)} + {c}", ""]
        (directory / f"module_{number}.py").write_text("\n".join(lines))
    return directory


class Sight(NamedTuple):
    """A run's directory at one moment. Directories are told apart by inode: a later one may have the same name."""

    partial: frozenset[int]  # data that is being written
    prepared: bool  # it is there
    saving: frozenset[int]  # checkpoints that are being written
    saved: frozenset[int]  # steps of finished checkpoints
    started: int  # when config.json was written: compilation begins
    metrics: tuple[int, int]  # inode and size


def look(run: Path) -> Sight:
    checkpoints = _entries(run / "checkpoints")
    return Sight(
        partial=frozenset(entry.inode() for entry in _entries(run) if entry.name.endswith(".partial")),
        prepared=(run / "data").exists(),
        saving=frozenset(entry.inode() for entry in checkpoints if "tmp" in entry.name),
        saved=frozenset(int(entry.name) for entry in checkpoints if entry.name.isdigit()),
        started=_stat(run / "config.json", lambda stat: stat.st_mtime_ns),
        metrics=_stat(run / "metrics.jsonl", lambda stat: (stat.st_ino, stat.st_size), (0, 0)))


def _entries(directory: Path) -> list[os.DirEntry]:
    try:
        return list(os.scandir(directory))
    except FileNotFoundError:
        return []


def _stat(path: Path, field, missing=0):
    try:
        return field(path.stat())
    except FileNotFoundError:
        return missing


class Progress:
    """What one process has done so far, seen from outside: when each thing happened first, in seconds since its start.

    Keys of `times`: data (writing began), data end, compile (data is there), compile end (a line of metrics), save and
    save end (of the newest checkpoint).
    """

    def __init__(self, run: Path) -> None:
        self.run, self.first, self.last = run, look(run), look(run)
        self.start = time.monotonic()
        self.times: dict[str, float] = {}
        self.saves = self.saved = 0
        self._size = None

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def update(self) -> None:
        old, self.last = self.last, look(self.run)
        if self.last.partial - self.first.partial:
            self.times.setdefault("data", self.seconds())
        if self.last.prepared and not self.first.prepared:
            self.times.setdefault("data end", self.seconds())
        if self.last.started != self.first.started:
            self.times.setdefault("compile", self.seconds())
        if self.last.metrics[0] != self.first.metrics[0]:  # a continued run begins by writing the old lines anew
            if self._size is None:
                self._size = self.last.metrics[1]
            elif self.last.metrics[1] > self._size:
                self.times.setdefault("compile end", self.seconds())
        if self.last.saving - old.saving - self.first.saving:
            self.saves += 1
            self.times["save"] = self.seconds()
        if self.last.saved - old.saved:
            self.saved += 1
            self.times["save end"] = self.seconds()

    def phase(self) -> str:
        """Where the process is (or was, when it was killed)."""
        if "compile" not in self.times:
            return "data" if "data" in self.times and "data end" not in self.times else "start-up"
        if "compile end" not in self.times:
            return "compile"
        if self.last.saving - self.first.saving:
            return "save"
        return "saved" if self.seconds() - self.times.get("save end", -1.0) < 2 * JUST_AFTER_SECONDS else "train"


class Aim(NamedTuple):
    """When to kill: `delay` seconds after the `count`-th event of `kind`.

    For "any", after the start, but not after `count` saved checkpoints: later kills need steps too.
    """

    kind: str
    count: int
    delay: float

    def hit(self, progress: Progress) -> bool:
        times, now = progress.times, progress.seconds()
        if self.kind == "any":
            return now >= self.delay or progress.saved >= self.count
        if self.kind == "save":
            return progress.saves > self.count or (
                progress.saves == self.count and now >= times["save"] + self.delay)
        if self.kind == "saved":
            return progress.saved > self.count or (
                progress.saved == self.count and now >= times["save end"] + self.delay)
        return f"{self.kind} end" in times or (self.kind in times and now >= times[self.kind] + self.delay)


class Kill(NamedTuple):
    """One kill: what it aimed at, what it hit ("missed": the run had ended before), and what it cost."""

    aim: str
    hit: str
    seconds: float
    step: int
    checkpoint: int

    @property
    def lost(self) -> int:
        """Steps to do again; none by a start that was killed before its first step (metrics then hold older ones)."""
        return 0 if self.hit in ("data", "start-up", "compile") else max(self.step - self.checkpoint, 0)


def plan(kills: int, rng: random.Random) -> list[str]:
    """Every kind equally often. Data first: it is written once, and again only after a kill that hits it."""
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    data, rest = [kind for kind in kinds if kind == "data"], [kind for kind in kinds if kind != "data"]
    rng.shuffle(rest)
    return data + rest


class Chaos:
    """Both runs, with the durations learnt from them."""

    def __init__(self, workdir: Path, config: str, overrides: dict[str, str]) -> None:
        self.workdir, self.steps = workdir, int(overrides["train.steps"])
        self.every = int(overrides["train.checkpoint_every"])
        self.arguments = [f"--config={config}", *(f"--config.{name}={value}" for name, value in overrides.items())]
        self.environ = {"JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").resolve()),
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | os.environ
        self.spans = {"data": 1.0, "compile": 5.0, "save": 0.1, "start": 10.0, "step": 0.05}
        self.starts = 0

    def process(self, run: Path, aim: Aim | None) -> Progress | None:
        """Start the run, kill it where `aim` says; None if it has ended before, in success."""
        self.starts += 1
        output = self.workdir / "output" / f"{run.name}_{self.starts:03d}.txt"
        output.parent.mkdir(exist_ok=True)
        progress = Progress(run)
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments.pretrain", *self.arguments, f"--workdir={run}"],
                env=self.environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and not (aim and aim.hit(progress)):
                if progress.seconds() > HUNG_SECONDS:
                    raise RuntimeError(f"{output}: hung for {HUNG_SECONDS} s, {progress.phase()}")
                time.sleep(POLL_SECONDS)
                progress.update()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.learn(run, progress)
        if process.returncode == -signal.SIGKILL:
            return progress
        if process.returncode != 0:
            lines = output.read_text("utf-8", "replace").splitlines()[-12:]
            raise RuntimeError(f"start {self.starts} failed by itself, status {process.returncode}, {output}:\n"
                               + "\n".join(lines))
        return None

    def learn(self, run: Path, progress: Progress) -> None:
        """Keep how long things took, for the next aims: a warm compilation cache makes them shorter."""
        times = progress.times
        for name in ("data", "compile", "save"):
            if name in times and times.get(f"{name} end", -1.0) > times[name]:
                self.spans[name] = times[f"{name} end"] - times[name]
        if "compile end" in times:
            self.spans["start"] = times["compile end"]
            steps = last_step(run) - max(progress.first.saved, default=0)
            if steps > 1:
                self.spans["step"] = (progress.seconds() - times["compile end"]) / steps

    def aim(self, kind: str, done: int, left: int, rng: random.Random) -> Aim:
        """A moment for `kind` that leaves enough steps for the `left` kills after this one."""
        room = rng.random() * (self.steps - done) / (left + 1)
        if kind == "any":
            span = self.spans["start"] + room * self.spans["step"]
            return Aim(kind, 2 + int(2 * room / self.every), rng.random() * span)
        # not quite to the end: this start may be faster than the one that taught us the span
        span = JUST_AFTER_SECONDS if kind == "saved" else self.spans[kind]
        return Aim(kind, 1 + int(room / self.every), rng.random() * 0.8 * span)

    def kill(self, run: Path, kind: str, left: int, rng: random.Random) -> Kill:
        if kind == "data" and look(run).prepared:
            kind = "any"  # an earlier aim came too late: the data is there for good
        aim = self.aim(kind, max(look(run).saved, default=0), left, rng)
        start = time.monotonic()
        progress = self.process(run, aim)
        return Kill(kind, progress.phase() if progress else "missed", time.monotonic() - start, last_step(run),
                    max(look(run).saved, default=0))


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_metrics(run / "metrics.jsonl")), default=0)


def arrays(directory: Path) -> dict[str, np.ndarray]:
    """Every leaf that Orbax finds in one item of a checkpoint, by its path in the tree."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(directory.resolve())
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def compare_checkpoints(one: Path, other: Path) -> tuple[list[str], int]:
    """Differences between two checkpoints, bit for bit, and how many arrays were compared."""
    items = {path.name for run in (one, other) for path in run.iterdir() if path.is_dir()}
    expected = {"params", "routing", "opt_state", "counters", "ema", "record"}
    found, count = [f"{one}: no {name}" for name in expected - items], 0
    for name in sorted(items):
        if not ((one / name).is_dir() and (other / name).is_dir()):
            found.append(f"{name} is in one checkpoint only")
        elif (one / name / "_METADATA").exists():
            left, right = arrays(one / name), arrays(other / name)
            found += [f"{name}{path} is in one checkpoint only" for path in sorted(left.keys() ^ right.keys())]
            for path in sorted(left.keys() & right.keys()):
                a, b = left[path], right[path]
                count += 1
                if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
                    found.append(f"{name}{path} differs")
        elif name in JSON_ITEMS:
            left, right = (json.loads((run / name / "metadata").read_text()) for run in (one, other))
            found += [f"{name} differs"] if left != right else []
        else:
            found.append(f"{name} holds neither arrays nor known JSON; teach this script to compare it")
    return found, count


def compare(straight: Path, killed: Path) -> tuple[list[str], dict[str, int]]:
    """What two runs differ in, and how much was compared."""
    def steps(run):
        return sorted(look(run).saved)

    def records(run):
        return [{name: value for name, value in record.items() if name not in TIMING}
                for record in read_metrics(run / "metrics.jsonl")]

    found = [f"checkpoints kept: {steps(straight)} and {steps(killed)}"] if steps(straight) != steps(killed) else []
    n_arrays = 0
    for step in sorted(set(steps(straight)) & set(steps(killed))):
        lines, count = compare_checkpoints(straight / "checkpoints" / str(step), killed / "checkpoints" / str(step))
        found += [f"checkpoint {step}: {line}" for line in lines]
        n_arrays += count
    left, right = records(straight), records(killed)
    if len(left) != len(right):
        found.append(f"metrics.jsonl: {len(left)} and {len(right)} records")
    found += [f"metrics.jsonl record {number}: {sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))}"
              for number, (a, b) in enumerate(zip(left, right, strict=False), start=1) if a != b]
    return found, {"checkpoints": len(steps(straight)), "arrays": n_arrays, "records": len(left)}


def table(kills: list[Kill]) -> str:
    """A line per aim: how many kills, where they hit, steps lost, and seconds each restart lived."""
    lines = [f"{'aim':8} {'kills':>5}  {'lost steps':>10}  {'mean s':>6}  hit"]
    for kind in (*KINDS, "all"):
        own = [kill for kill in kills if kind in (kill.aim, "all")]
        hits = ", ".join(f"{count} {name}" for name, count in Counter(kill.hit for kill in own).most_common())
        mean = sum(kill.seconds for kill in own) / max(len(own), 1)
        lines.append(f"{kind:8} {len(own):5}  {sum(kill.lost for kill in own):10}  {mean:6.1f}  {hits}")
    return "\n".join(lines)


def main(overrides: Sequence[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # through `process`, which leaves nothing running
    workdir, rng = Path(WORKDIR.value), random.Random(SEED.value)
    require(not workdir.exists(), f"--workdir={workdir} exists; give a new directory")
    own = dict(text.split("=", 1) for text in overrides if "=" in text)
    settings = small(workdir / "corpus", KILLS.value) | own
    launch.load_config(CONFIG.value, [f"{name}={value}" for name, value in settings.items()])
    write_corpus(workdir / "corpus")
    chaos = Chaos(workdir, CONFIG.value, settings)
    straight, killed = workdir / "straight", workdir / "killed"
    start = time.monotonic()
    chaos.process(straight, None)
    print(f"undisturbed: {chaos.steps} steps in {time.monotonic() - start:.0f} s", flush=True)
    kills, kinds = [], plan(KILLS.value, rng)
    for number, kind in enumerate(kinds):
        kills.append(chaos.kill(killed, kind, len(kinds) - number - 1, rng))
        print(f"kill {number + 1}: aimed at {kills[-1].aim}, hit {kills[-1].hit} after {kills[-1].seconds:.1f} s, "
              f"step {kills[-1].step}, checkpoint {kills[-1].checkpoint}", flush=True)
    chaos.process(killed, None)
    found, compared = compare(straight, killed)
    leftovers = sorted(path.name for pattern in ("*.partial", ".*.partial", "checkpoints/*tmp*")
                       for path in killed.glob(pattern))
    report = {"kills": [kill._asdict() | {"lost": kill.lost} for kill in kills], "seed": SEED.value,
              "steps": chaos.steps, "starts": chaos.starts - 1, "seconds": time.monotonic() - start,
              "compared": compared, "differences": found, "leftovers": sorted(set(leftovers))}
    (workdir / "chaos.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{table(kills)}\n\n{chaos.starts - 1} starts of the killed run; compared: "
          + ", ".join(f"{count} {name}" for name, count in compared.items()))
    if found:
        print("\n".join(["DIFFERENT:", *found[:40]]))
        sys.exit(1)
    print("identical, bit for bit")


if __name__ == "__main__":
    launch.run(main)
