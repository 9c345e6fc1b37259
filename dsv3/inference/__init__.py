"""Rank 6: caches, sampling and generation. Never imports `dsv3.train`, nor the other way round."""
