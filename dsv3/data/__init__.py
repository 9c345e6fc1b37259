"""Rank 5: text in, packed token batches out, resumable (docs/data.md)."""
