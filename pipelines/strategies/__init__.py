"""What is trained and compared: a module per kind of strategy, and one table of them."""
