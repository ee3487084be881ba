"""One file a task: its data, its training and its evaluation."""
