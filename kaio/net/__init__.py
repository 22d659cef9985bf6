"""asyncio: transports, protocols and streams, and who dials, accepts and serves.

tap              seeing the data of one protocol
ending           the stages of a connection's end, as a table
internals        what is relied on inside asyncio's and uvloop's loops
endpoints        what a connection starts with, and where it was accepted
transports       a transport that knows whether its peer is still there
protocols        the callbacks: peer_suspect, peer_recovered, peer_dead
draining         an event for each connection, and the signals that a server waits for
current          the connection of the code that runs, and its log records
connection       the stream
attachment       what kaio attaches to a protocol: its terms, then its transport
_mypy_bases      the bases of kaio's protocols, as mypy sees them
asyncio_streams  asyncio's reader and writer
dialing          resolving, attempts, TLS arguments: shared by all that connect
pending          the result of connect and serve, to be awaited or entered
connector        making one connection
retry            when to connect again
reconnecting     one connection after the other
slots            who of many tasks may use one of few connections
pooled           a connection of a pool's
pool             Pool
client           connect
handed_over      sockets of systemd's or a parent's
binding          the sockets of one address
exhaustion       running out of descriptors
gate             limits: of all connections, and of one peer's
proxy_protocol   what a proxy says of its client: a parser
proxied          reading that from a socket
accepting        the accept loop, and the loops' own servers
notify           sd_notify
listeners        an address and its policy
server           serve
"""
