"""Thin launchers: flags in, library calls, printed results out."""
