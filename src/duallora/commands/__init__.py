"""The commands: one typed function a verb, and how its arguments are read from a command line."""
