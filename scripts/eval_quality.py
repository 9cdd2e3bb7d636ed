"""`quantkit eval` as a script: perplexity of a model and its divergence from the original. --help has the options."""

import sys

from quantkit.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "eval")
    main()
