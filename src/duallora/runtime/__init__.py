"""Where and how a program computes: devices, processes, progress."""
