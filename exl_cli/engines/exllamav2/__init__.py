"""The CUDA engine: exllamav2, with what is wrong in it mended here and nowhere else."""
