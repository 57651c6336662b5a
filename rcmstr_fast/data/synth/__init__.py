"""Rendered word images."""
