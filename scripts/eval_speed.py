"""`quantkit bench` as a script: time of the packed linears, prefill and decode speed. --help has the options."""

import sys

from quantkit.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
