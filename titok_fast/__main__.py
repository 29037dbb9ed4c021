"""`python -m titok_fast` is the command `titok-fast`, also under torchrun."""

import sys

from titok_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
