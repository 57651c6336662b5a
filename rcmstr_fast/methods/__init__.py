"""Pretraining methods: what a step computes."""
