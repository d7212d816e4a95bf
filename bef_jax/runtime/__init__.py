"""What a run needs around the computation itself: devices, processes, files and memory."""
