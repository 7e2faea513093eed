"""One script per question, each with a command line: `python -m analyze.<script> --help`."""
