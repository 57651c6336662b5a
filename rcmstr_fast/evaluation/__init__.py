"""Decoders trained on an encoder, protocols and tables."""
