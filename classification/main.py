"""Train or evaluate an image classifier: `python classification/main.py --help`."""

import sys

from ssm_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
