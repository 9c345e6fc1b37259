"""Rank 1: number formats, tiles and scales as exact functions of bare arrays; the fast forms must agree to the bit."""
