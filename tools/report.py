"""`fdd report` from a checkout."""

from megatron_fdd.cli.report import command

if __name__ == "__main__":
    command()
