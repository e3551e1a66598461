"""Start the command line; `lit-resnorm` does the same where it is installed."""

import sys

from lit_resnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
