"""A client that stays connected for ever: when its server is gone, for whatever reason, it connects again.

python examples/client.py --port 9000          # to one of the echo servers
python examples/client.py --port 9443 --tls
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import ssl
import sys

import kaio


async def talk(connection: kaio.Connection, every: float) -> None:
    """Say something now and then, and wait for the echo."""
    for number in itertools.count(1):
        words = b"hello %d\n" % number
        await connection.send(words)
        try:
            async with asyncio.timeout(10):
                await connection.receive_exactly(len(words))
        except TimeoutError:
            # Our own patience has ended, and nothing else: a dead server raises DeadPeerError, which is another thing.
            print(f"no echo yet, and the server is {connection.health().state}", flush=True)
            return
        print(f"echoed: {words.decode().strip()}", flush=True)
        await asyncio.sleep(every)


async def main() -> None:
    """Talk until interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--cafile", help="whom to trust, in place of the system's authorities")
    parser.add_argument("--keepalive", help="a policy such as 20s:10s:4, detect=30s or off")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between words")
    options = parser.parse_args()
    context = ssl.create_default_context(cafile=options.cafile) if options.tls else None
    # The logger "kaio" says of what a server has died, and when the next attempt is made, and why.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

    async for connection in kaio.connect(options.host, options.port, keepalive=options.keepalive, ssl=context):
        async with connection:  # until it has ended: then the loop connects again
            print(f"connected to {options.host}:{options.port}, keepalive {connection.keepalive}", flush=True)
            await talk(connection, options.every)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        kaio.run(main())
