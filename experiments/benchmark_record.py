"""What every measurement is kept with: device, versions, date and command."""

import json
import os
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
from absl import flags

from dsv3.config import UserError, require

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


def check_json() -> None:
    """Raise `UserError` for a `--json` that cannot be written, before anything is measured."""
    if not flags.FLAGS.json:
        return
    path = Path(flags.FLAGS.json)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error.strerror}") from error
    require(not path.is_dir(), f"--json={path} cannot be written: it is a directory")
    require(os.access(path if path.exists() else path.parent, os.W_OK), f"--json={path} cannot be written: not allowed")


def write_json(figures) -> None:
    """To `--json`, if that is given."""
    if flags.FLAGS.json:
        Path(flags.FLAGS.json).write_text(json.dumps(figures, indent=2) + "\n")
