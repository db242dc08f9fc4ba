"""Operating system helpers: files, processes, signals, memory, NVML, units, versions."""
