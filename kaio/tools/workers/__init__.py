"""What `kaio serve` does: a supervisor that holds the listening sockets, and workers that serve.

settings      what the command was told; frozen, and JSON on the way to a worker
tls           the TLS context of certificate files
backoff       how long a slot waits before its next worker
logs          one line a record on standard error
sockets       the listening sockets, and which worker gets which
channel       messages between the two kinds of processes
application   what `module:name` means
child         a worker as the supervisor sees it: a process and a channel
supervisor    starts workers, replaces those that die, reloads, stops
_worker       a worker's process: `python -m kaio.tools.workers._worker`

The supervisor never imports the application: each worker is a new interpreter, so that a reload runs new code.
"""
