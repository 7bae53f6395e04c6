"""The program `ckpt`: starts and ends quickly, which Python's garbage collector would not let it."""

from __future__ import annotations

import gc


def main() -> None:
    """Run the command line."""
    # Importing makes hundreds of thousands of objects and no garbage: looking through them again and again took a tenth of a second.
    gc.set_threshold(2_000_000, 50, 50)
    from cli.app import main as run  # noqa: PLC0415 - after that

    try:
        run()
    finally:
        gc.freeze()  # nor need they be looked through once more before everything ends anyway


if __name__ == "__main__":
    main()
