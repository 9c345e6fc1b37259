"""The variants that a config file asks to compare, and the run of each with each seed."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from dsv3.config import Config, UserError, from_dict, override, require
from dsv3.config.schema import nearest
from experiments.compare import Trained, read_run


class Comparison(NamedTuple):
    """What the file of an experiment asks to compare.

    variants: name -> overrides of its config; baselines: a variant -> the one to compare it with; noise: the variant
    that differs from its baseline in rounding only, or None; start: the variant that all others go on from, or None.
    """

    variants: dict[str, dict[str, str]]
    baselines: dict[str, str]
    noise: str | None
    start: str | None = None

    @classmethod
    def of(cls, module: ModuleType, path: str) -> "Comparison":
        """`VARIANTS`, `BASELINES`, `NOISE` and, if it has one, `START` of a config file.

        Raises `UserError` for missing or unknown names.
        """
        missing = [name for name in ("VARIANTS", "BASELINES", "NOISE") if not hasattr(module, name)]
        require(not missing, f"--config={path} defines no {' and no '.join(missing)}; see configs/ablation.py")
        comparison = cls(module.VARIANTS, module.BASELINES, module.NOISE, getattr(module, "START", None))
        named = {*comparison.baselines, *comparison.baselines.values()} - {*comparison.variants}
        require(not named, f"BASELINES of --config={path} names {', '.join(sorted(named))}, not among VARIANTS")
        require(comparison.noise is None or comparison.noise in comparison.baselines,
                f"NOISE of --config={path} is {comparison.noise!r}, which has no baseline in BASELINES")
        require(comparison.start is None or comparison.start in comparison.variants,
                f"START of --config={path} is {comparison.start!r}, not among VARIANTS")
        require(comparison.start not in {*comparison.baselines, *comparison.baselines.values()},
                f"BASELINES of --config={path} names {comparison.start!r}, which the others only go on from")
        return comparison


class Run(NamedTuple):
    """One variant with one seed."""

    variant: str
    seed: str
    config: Config
    directory: Path

    def trained(self) -> Trained:
        """As far as it has come."""
        return read_run(self.directory, self.config.train)

    def settled(self) -> bool:
        """Whether it has finished or diverged with this very config, wherever its start lay at that time."""
        file = self.directory / "config.json"
        anywhere = lambda config: replace(config, train=replace(config.train, start_from=None))
        return (self.trained().settled and file.exists()
                and anywhere(from_dict(Config, json.loads(file.read_text()))) == anywhere(self.config))

    def check_start(self) -> None:
        """Raise `UserError` unless the run that it goes on from has finished."""
        if self.config.train.start_from is not None:
            start = Path(self.config.train.start_from)
            record = start / "config.json"
            train = from_dict(Config, json.loads(record.read_text())).train if record.exists() else self.config.train
            require(read_run(start, train).validation is not None,
                    f"{self.directory.name} goes on from {start.name}, which has not finished; train that one first")


def short(name: str) -> str:
    """A variant's name as its directory has it."""
    return name.replace(" ", "_").replace(",", "")


def plan(config: Config, comparison: Comparison, workdir: Path, seeds: Sequence[str]) -> list[Run]:
    """All runs, seed by seed, those first that others start from. Raises `UserError` for an override that a config
    refuses."""
    runs = []
    directory = lambda name, seed: workdir / f"{short(name)}-{seed}"
    for seed in seeds:
        for name, changes in comparison.variants.items():
            more = {"train.seed": seed}
            if comparison.start not in (None, name):
                more["train.start_from"] = str(directory(comparison.start, seed))
            try:
                variant = override(config, changes | more)
            except UserError as error:
                raise UserError(f"variant {name!r}: {error}") from error
            runs.append(Run(name, seed, variant, directory(name, seed)))
    return sorted(runs, key=lambda run: run.variant != comparison.start)


def seeds_of(comparison: Comparison, workdir: Path, seeds: Sequence[str]) -> list[str]:
    """`seeds`, and those of other starts that have left runs."""
    names = [run.name.rpartition("-") for run in workdir.glob("*-*")]
    found = {seed for name, _, seed in names if name in map(short, comparison.variants) and seed.isdigit()}
    return sorted({*seeds, *found}, key=int)


def chosen(runs: Sequence[Run], only: Sequence[str] | None) -> list[Run]:
    """Those of the variants named; all for None."""
    names = list(dict.fromkeys(short(run.variant) for run in runs))
    for name in only or ():
        require(short(name) in names, f"--only: there is no variant {name!r}; {nearest(short(name), names)}")
    return [run for run in runs if only is None or short(run.variant) in map(short, only)]
