"""Rank 4: what concerns more than one device or more than one micro-batch."""
