"""What the commands of analyze/ compute and draw: module X is the work of the command analyze/X.py, whose options it is
given by `command(args)`. The commands import it once their options are parsed, so that --help comes at once."""
