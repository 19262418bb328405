"""``python -m modalkit``: the command ``modalkit``."""

from modalkit.service.cli import main

if __name__ == "__main__":
    main()
