"""`python -m quantkit`, and `torchrun --nproc-per-node N -m quantkit`: the `quantkit` command."""

from quantkit.cli import main

if __name__ == "__main__":
    main()
