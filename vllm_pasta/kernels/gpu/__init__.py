"""Steered attention on the GPU, in Triton: ``launch`` is called, ``steer`` is what runs there."""
