"""asyncio: transports, protocols and streams, and who dials, accepts and serves.

ending       the stages of a connection's end, as a table
internals    what is relied on inside asyncio's and uvloop's loops
endpoints    what a connection starts with, and where it was accepted
transports   a transport that knows whether its peer is still there
protocols    the callbacks: peer_suspect, peer_recovered, peer_dead
connection   the stream
dialing      resolving, attempts, TLS arguments: what all who connect share
client       connect
listeners    bind and accept
server       serve
"""
