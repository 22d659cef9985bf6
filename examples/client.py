"""A client that stays connected: it finds out that its server died, backs off, and connects again.

python examples/client.py --port 9000          # to one of the echo servers
python examples/client.py --port 9443 --tls
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import ssl

import anyio

import kaio

LONGEST_PAUSE = 30.0  # seconds


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
            raise
        print(f"echoed: {words.decode().strip()}", flush=True)
        await asyncio.sleep(every)


async def main() -> None:
    """Talk, and connect again when the connection has ended, until interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--cafile", help="whom to trust, in place of the system's authorities")
    parser.add_argument("--keepalive", help="a policy such as 20s:10s:4, detect=30s or off")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between words")
    options = parser.parse_args()
    context = ssl.create_default_context(cafile=options.cafile) if options.tls else None

    pause = 0.5
    while True:
        try:
            # The policy bounds the connecting too: a host that is switched off is a DeadPeerError as well.
            async with kaio.connect(options.host, options.port, keepalive=options.keepalive, ssl=context) as connection:
                print(f"connected to {options.host}:{options.port}, keepalive {connection.keepalive}", flush=True)
                pause = 0.5
                await talk(connection, options.every)
        except kaio.DeadPeerError as error:
            print(f"{error}", flush=True)
        except ssl.SSLCertVerificationError:
            raise  # trying again will not make it trustworthy
        except (OSError, anyio.BrokenResourceError, anyio.IncompleteRead) as error:
            print(f"not connected: {error!r}", flush=True)
        # A random part of it, so that a thousand clients do not come back to a restarted server all at once.
        await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - no secret
        pause = min(2 * pause, LONGEST_PAUSE)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        kaio.run(main())
