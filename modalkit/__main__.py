"""The command ``modalkit``, and ``python -m modalkit``."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C while its modules are imported, which takes a second, ends it with the code 130."""
    try:
        from modalkit.service.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
