"""`fdd prepare` from a checkout."""

from megatron_fdd.cli.prepare_data import command

if __name__ == "__main__":
    command()
