"""lm-evaluation-harness: our models for it, its tasks for us. The only room that knows it."""
