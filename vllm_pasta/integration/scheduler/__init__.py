"""The scheduler: which KV cache blocks requests may share."""
