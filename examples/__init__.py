"""Programs to start from. Each runs by itself: `python examples/client.py --help`."""
