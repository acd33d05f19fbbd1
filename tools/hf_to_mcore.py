"""`fdd import` from a checkout."""

from megatron_fdd.cli.hf_to_mcore import command

if __name__ == "__main__":
    command()
