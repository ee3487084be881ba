"""What was measured, as something to look at."""

from mixhead.report.comparison import plot_head_load, plot_perplexity, write_comparison

__all__ = ["plot_head_load", "plot_perplexity", "write_comparison"]
