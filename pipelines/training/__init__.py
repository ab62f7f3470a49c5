"""Training on one worker: batches, the loss of an episode, the optimiser's state, the loop."""
