"""Training on one worker: batches, the loss of an episode, the optimiser's state, the loop."""

from pipelines import environment

environment.for_training()
