"""``lbq run``"""

import click


@click.command()
def run() -> None:
    """placeholder"""
