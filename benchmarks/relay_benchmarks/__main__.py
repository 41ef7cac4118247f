"""`python -m relay_benchmarks`: the benchmarks without the server's command line around them."""

import sys

from relay_benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
