"""`python -m minildm`: the command line without an installed script."""

from minildm.cli import main

if __name__ == "__main__":
    main()
