"""Causal language models: tuned, evaluated, compared."""
