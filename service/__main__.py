"""Runs the command line: `python -m service` does the same as `episodic`."""

from service.cli.main import app

if __name__ == "__main__":
    app()
