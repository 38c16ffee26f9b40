"""The command line of the package, as ``python -m ncprior``."""

import sys

from ncprior.cli import main

if __name__ == "__main__":
    sys.exit(main())
