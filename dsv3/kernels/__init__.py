"""Rank 2: one file per operation, the reference first; faster forms share its signature."""
