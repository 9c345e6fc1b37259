"""Rank 6: schedules, optimizer, the step, the loop, checkpoints and metrics."""
