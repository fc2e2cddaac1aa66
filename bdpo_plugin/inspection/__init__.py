"""What is looked at without training: a configuration, its data, its memory and its cost."""
