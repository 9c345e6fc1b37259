"""Rank 8: Hugging Face checkpoints of the DeepSeek family, in and out."""
