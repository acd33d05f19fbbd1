"""`fdd evaluate` from a checkout."""

from megatron_fdd.cli.evaluate import command

if __name__ == "__main__":
    command()
