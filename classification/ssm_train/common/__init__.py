"""What does not know of images or models: errors, commands, files, processes, signals, seeds, the machine."""
