"""``python -m surgeon``."""

from surgeon.cli import main

if __name__ == "__main__":
    main()
