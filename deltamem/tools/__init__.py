"""What looks at a model: inspection, throughput, and how both are measured."""
