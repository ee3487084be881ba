"""Masked language modelling with attention experts."""
