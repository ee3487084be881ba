"""The models of both papers, and any model of transformers in mixture-of-head form: one folder each."""
