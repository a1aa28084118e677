"""The worker process: attention backends that steer, and which request each row belongs to."""
