"""What a run needs of the machine: devices, processes, memory, files and signals."""
