"""What every layer may use of the machine: files, processes, memory, NVML, units, interrupts."""
