"""Printing the results of a run for people."""


def results_table(results: dict) -> str:
    """The final figures as aligned lines, with what each should be compared to."""
    listed = lambda values: ", ".join(f"{value:.2f}" for value in values) or "none"
    rows = [
        ("validation", f"{results['validation_bits_per_byte']:.3f} bits per byte"),
        ("bigram, same tokens", f"{results['bigram_bits_per_byte']:.3f} bits per byte"),
        ("xz -9e, same text", f"{results['xz_bits_per_byte']:.3f} bits per byte"),
        ("MaxVio by MoE layer", listed(results["max_vio"])),
        ("MTP agreement", f"{listed(results['mtp_agreement'])} (chance {listed(results['mtp_chance'])})"),
        ("speed", f"{results['tokens_per_second']:,.0f} tokens/s, {results['seconds']:.0f} s in this session"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
