"""Encoders, heads and decoders; they know nothing of data or of distributed training."""
