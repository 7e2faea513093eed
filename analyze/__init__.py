"""One script per question, each with a command line: `python analyze/<script>.py --help`."""
