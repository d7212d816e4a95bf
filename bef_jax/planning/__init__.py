"""What a step costs: measured on this machine, or compiled for hardware that is not there."""
