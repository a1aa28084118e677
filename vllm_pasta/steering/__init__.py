"""What one step of the engine is told: the steered requests of a batch as tensors."""
