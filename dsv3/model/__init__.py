"""Rank 3: single-device mathematics of the DeepSeek-V3 family. No mesh, no collective, no backend branch."""
