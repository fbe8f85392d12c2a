"""`python -m tunefleet`: the commands, for who has the package and no script of it, as a submitted job."""

from tunefleet.cli import main

if __name__ == "__main__":
    main()
