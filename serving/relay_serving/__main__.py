"""`python -m relay_serving` is `vllm-relay`."""

import sys

from relay_serving.cli import main

if __name__ == "__main__":
    sys.exit(main())
