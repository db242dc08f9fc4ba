"""The CUDA engine, built on exllamav2. All workarounds for its defects are in this package."""
