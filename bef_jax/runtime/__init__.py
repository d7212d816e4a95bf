"""What a run needs of the machine: its devices, its memory, and how the log speaks of them."""
