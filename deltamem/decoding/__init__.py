"""Many sequences decoded side by side, each in a slot of its own."""
