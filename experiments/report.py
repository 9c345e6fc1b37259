"""Printing the results of a run for people."""


def results_table(results: dict) -> str:
    """The final figures as aligned lines, with what each should be compared to."""
    listed = lambda values: ", ".join(f"{value:.2f}" for value in values) or "none"
    averaged = results["ema_bits_per_byte"]
    rows = [
        ("validation", f"{results['validation_bits_per_byte']:.3f} bits per byte"),
        ("with averaged weights", "none kept" if averaged is None else f"{averaged:.3f} bits per byte"),
        ("bigram, same tokens", f"{results['bigram_bits_per_byte']:.3f} bits per byte"),
        ("xz -9e, same text", f"{results['xz_bits_per_byte']:.3f} bits per byte"),
        ("MaxVio by MoE layer", listed(results["max_vio"])),
        ("MTP agreement", f"{listed(results['mtp_agreement'])} (chance {listed(results['mtp_chance'])})"),
        ("speed", f"{results['tokens_per_second']:,.0f} tokens/s, {results['seconds']:.0f} s in this session"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def cleaning_table(report: dict) -> str:
    """Documents and megabytes read, dropped by each rule and kept, with an example of what was dropped."""
    read = report["counts"]["read"]
    lines = [f"  {'':<16}{'documents':>11}{'share':>8}{'MB':>11}{'share':>8}  for example"]
    for name in [name for name in report["counts"] if name != "kept"] + ["kept"]:
        row = report["counts"][name]
        documents, size = (row[unit] / max(1, read[unit]) for unit in ("documents", "bytes"))
        example = "".join(names[0] for names in report["examples"].get(name, [])[:1])
        example = example.encode(errors="backslashreplace").decode()
        example = example if len(example) <= 56 else f"...{example[-53:]}"
        lines.append(f"  {name:<16}{row['documents']:>11,}{documents:>8.1%}{row['bytes'] / 1e6:>11,.1f}{size:>8.1%}"
                     f"  {example}".rstrip())
    return "\n".join(lines)


def ablation_table(figures: dict[str, dict[str, dict]]) -> str:
    """A row a variant: every figure as the mean over its seeds, with half the range between them if there are several.

    Relative differences are percent of the baseline's loss (`experiments/compare.py`).
    """
    columns = {
        "loss": ("loss", ".3f"), "validation_bits_per_byte": ("bits/byte", ".3f"),
        "relative_largest": ("largest %", ".3f"), "relative_mean": ("mean %", ".3f"), "max_vio": ("MaxVio", ".2f"),
        "max_vio_worst_layer": ("worst layer", ".2f"), "mtp_agreement": ("MTP agrees", ".2f"),
        "tokens_per_second": ("tokens/s", ",.0f")}
    rows = [["", *(title for title, _ in columns.values()), ""]]
    for name, seeds in figures.items():
        cells = []
        for column, (_, form) in columns.items():
            values = [seed[column] for seed in seeds.values() if seed.get(column) is not None]
            spread = f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):{form}}{spread}" if values else "-")
        ends = [f"step {found['last_step']} so far (seed {seed})" if found["diverged"] is None
                else f"diverged at step {found['diverged']} (seed {seed})"
                for seed, found in seeds.items() if "last_step" in found]
        rows.append([name, *cells, ", ".join(ends)])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for name, *cells, ends in rows:
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:-1], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *right, ends]).rstrip())
    return "\n".join(lines)
