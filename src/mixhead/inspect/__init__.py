"""Running a model to look at it: recording, steering, attention weights, a page to play with."""

TOKENS = 1000  # that are read of each text
