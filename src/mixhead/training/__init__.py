"""What every training run has, whatever is trained: its folder, its course, its checkpoints, its log."""
