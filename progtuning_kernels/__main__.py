"""`python -m progtuning_kernels` is the `progtuning` command."""

from .cli.app import main

if __name__ == "__main__":
    main()
