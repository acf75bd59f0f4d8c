"""What every kernel compiles to, on GPUs that are not here."""
