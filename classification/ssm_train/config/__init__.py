"""What is asked for: the keys and their defaults, yaml files, the command line's overrides."""
