"""Triton kernels and their launchers; imports nothing of fastpref. Installed as `fastpref.kernels`."""
