"""Measuring what was made."""
