"""Imported by every Python that a test run starts, before anything else: puts kaio's loop in place when told to.

It is not enough to do so in the process that runs the tests: suites start programs of their own that make loops, such
as those that are sent signals.
"""

from __future__ import annotations

import os

if os.environ.get("CONFORMANCE_LOOP"):
    from scripts.conformance import substitute

    substitute.install(os.environ["CONFORMANCE_LOOP"])
