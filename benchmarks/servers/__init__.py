"""The servers that are measured, each a process: `python -m benchmarks.servers CONTENDER LOOP APPLICATION [POLICY]`.

One module for each way to write one, all with the same four applications, as its users would write them:

    wire               what the applications and the load generator agree on
    journal            who connected, and when the death of each was reported
    protocols          asyncio.Protocol and kaio.KeepaliveProtocol
    streams            asyncio's streams; the same with asyncio.timeout around every read
    anyio_streams      anyio's TCP streams
    connections        kaio.Connection
    supervised         what watches over peers without kaio: a ping task for each connection, a timeout of each read

Applications: *echo* sends back what comes; *greet* sends one byte and waits for the end; *bulk* receives or sends a
large amount; *report* waits for the peer's death and notes the moment.
"""
