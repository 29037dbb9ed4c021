"""`python -m titok_fast` is the command `titok-fast`, also under torchrun."""

from titok_fast.cli.main import run

if __name__ == "__main__":
    run()
