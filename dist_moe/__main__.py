"""``python -m dist_moe`` is ``dist-moe``; launchers that start modules use it."""

from dist_moe.cli.main import console_script

if __name__ == "__main__":
    console_script()
