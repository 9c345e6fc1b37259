"""Rank 1: number formats, exact reference numerics on bare arrays."""
