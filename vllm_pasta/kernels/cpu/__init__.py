"""Steered attention on the CPU: ``select`` chooses a kernel, ``launch`` calls the one in C++."""
