"""`fdd export` from a checkout."""

from megatron_fdd.cli.mcore_to_hf import command

if __name__ == "__main__":
    command()
