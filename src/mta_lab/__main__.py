"""``python -m mta_lab`` is ``mta-lab``."""

from mta_lab.cli import main

if __name__ == "__main__":
    main()
