"""A decode step as about five launches a layer: an engine beside ``engine_cuda`` that has to prove itself first."""
