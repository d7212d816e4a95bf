"""What a run needs from the machine: devices, processes, memory, files and signals."""
