"""What every measurement is kept with: device, versions, date and command."""

import json
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
from absl import flags

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch", "transformers")
PRIVATE = ("--json", "--profile", "--scratch", "--update")
"""Flags that say where something was written, which is no part of a measurement."""


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command(arguments: list[str]) -> str:
    """A command line as anybody would type it, from `sys.orig_argv`."""
    kept = [text for text in arguments[1:] if text.partition("=")[0] not in PRIVATE]
    return shlex.join(["python", *kept])


def record(kind: str, figures: dict) -> dict:
    """`figures` of a benchmark with their header; `kind` says how to render them (`benchmark_render`)."""
    return {"kind": kind, "device": jax.devices()[0].device_kind, "versions": versions(),
            "date": time.strftime("%Y-%m-%d"), "command": command(sys.orig_argv), **figures}


def write_json(figures) -> None:
    """To `--json`, if that is given."""
    if flags.FLAGS.json:
        Path(flags.FLAGS.json).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.FLAGS.json).write_text(json.dumps(figures, indent=2) + "\n")
