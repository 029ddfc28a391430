"""`python -m qft_plugin`: the same as `qft`."""

from qft_plugin.cli.entry import main

if __name__ == "__main__":
    main()
