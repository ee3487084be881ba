"""One room a task: its configuration, its training and its evaluation; none imports another."""
