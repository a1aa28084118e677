"""What a user asks for, from a request's words to token ranges. Imports no torch, no vLLM."""
