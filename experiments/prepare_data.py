"""Clean a corpus: python -m experiments.prepare_data --files=text/**/*.md,more.jsonl.gz --output=cleaned

Drops bad and duplicate documents (docs/cleaning.md) and writes the others as shards for training, to be named with
--config.data.sources.0.files=cleaned, beside report.json.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from dsv3.config import UserError, require
from dsv3.data.clean import REPORT, CleanConfig, clean
from dsv3.data.corpus import Document, find_files, read_documents
from dsv3.data.dedup import NearConfig
from dsv3.data.quality import Limits, parse_rules
from experiments import launch
from experiments.report import cleaning_table

FILES = flags.DEFINE_list("files", None, "files, directories and globs of txt, md, rst, py, jsonl, jsonl.gz, parquet",
                          required=True)
OUTPUT = flags.DEFINE_string("output", None, "directory to write; must not exist, or be empty", required=True)
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "field of jsonl records and column of Parquet tables")
RULES = flags.DEFINE_list("rules", ["text"], "quality rules, or sets of them: text (prose), code, none")
DUPLICATES = flags.DEFINE_enum("duplicates", "near", ["near", "exact", "none"], "which duplicates to drop")
UNIT = flags.DEFINE_enum("unit", "words", ["words", "characters"], "near duplicates: what a shingle is a run of")
SHINGLE = flags.DEFINE_integer("shingle", 5, "near duplicates: units of a shingle")
NUM_PERM = flags.DEFINE_integer("num_perm", 128, "near duplicates: hash functions; more of them miss fewer pairs")
THRESHOLD = flags.DEFINE_float("threshold", 0.8, "near duplicates: Jaccard index from which a document is dropped")
SEED = flags.DEFINE_integer("seed", 0, "near duplicates: seed of the hash functions")
WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "processes beside this one; the output is the same for all")
LIMITS = {field.name: (flags.DEFINE_integer if field.type is int else flags.DEFINE_float)(
    field.name, field.default, field.metadata["help"]) for field in dataclasses.fields(Limits)}


def config() -> CleanConfig:
    """The flags as a validated configuration."""
    near = NearConfig(unit=UNIT.value, shingle=SHINGLE.value, num_perm=NUM_PERM.value, threshold=THRESHOLD.value,
                      seed=SEED.value)
    return CleanConfig(
        rules=parse_rules(RULES.value), limits=Limits(**{name: flag.value for name, flag in LIMITS.items()}),
        duplicates=DUPLICATES.value != "none", near=near if DUPLICATES.value == "near" else None)


def documents(files: Sequence[str], text_field: str, undecodable: bool) -> Iterator[Document]:
    """All documents of `files`. With `undecodable`, bytes of a text file that are no text become half surrogate pairs.

    The rule of that name drops these, so that one such file does not end the run. A bad record of a jsonl or Parquet
    file does: nobody knows what follows it.
    """
    for name, path in find_files(files):
        try:
            yield from read_documents((str(path),), text_field)
        except UserError:
            if not undecodable or path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
                raise
            yield Document(name, path.read_bytes().decode("utf-8", "surrogateescape"))


def main(overrides: Sequence[str]) -> None:
    require(not overrides, "--config.FIELD=VALUE belongs to training; see --help for the flags of prepare_data")
    require(OUTPUT.value != "", "--output is empty; give a directory")
    settings = config()
    read = documents(FILES.value, TEXT_FIELD.value, "undecodable" in settings.rules)
    report = clean(read, Path(OUTPUT.value), settings, WORKERS.value)
    print(cleaning_table(report))
    print(f"\n{len(report['files'])} shards and {REPORT} in {OUTPUT.value}; train with "
          f"--config.data.sources.0.files={OUTPUT.value}")


if __name__ == "__main__":
    launch.run(main)
