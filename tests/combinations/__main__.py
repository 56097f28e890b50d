"""`python -m tests.combinations`: see `runs`. Processes that are spawned cannot import functions from this module."""

from tests.combinations.runs import main

if __name__ == "__main__":
    main()
