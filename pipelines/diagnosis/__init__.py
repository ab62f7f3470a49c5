"""What a run needs of its machine and of others, what of it is missing, and about what the run will cost."""
