"""The proof that kaio's event loop behaves as its base: other people's test suites, run over both and compared.

`make conformance` runs the suites of CPython's asyncio, of uvloop and of anyio twice, once over the base loop and once
over kaio's loop on that base, and compares test by test. A test that passes over the base and not over kaio's loop is a
regression, and the exit status is 1.

The map; each row imports only from the rows above it:

    records                          what a run writes down, test by test, and how it is read back
    substitute  site/sitecustomize   put kaio's loop where suites make theirs, in every process of a run
    run_unittest  plugin             run the tests of one module, with unittest or pytest
    places                           the interpreter, the cache with its environment, the network of a run's own
    suites                           what the three suites are, and where their files come from
    jobs                             run a module on a side; go on after a hang or a crash
    compare                          judge: regressions, flaky tests, counts; no I/O
    report                           the table, the list, the JSON
    __main__                         the command
"""

from __future__ import annotations

__all__: list[str] = []
