"""``python -m mta`` is ``mta``."""

from mta.cli import main

if __name__ == "__main__":
    main()
