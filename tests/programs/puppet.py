"""Runs the statements that it is sent, a line of JSON each, and answers with what they leave in `it`."""

from __future__ import annotations

import json
import os
import socket
import sys

names = {"os": os, "socket": socket, "TCP": socket.IPPROTO_TCP, "it": None}
for line in sys.stdin:
    exec(json.loads(line), names)
    print(json.dumps(names.pop("it", None)), flush=True)
