"""What kaio costs, beside its peers: `python -m benchmarks`, or one question, as `python -m benchmarks.echo`.

The map:

    contenders              who is compared
    servers/                the servers, each a process: the same applications written for each contender
    native/ native_programs load generator, physical limit and witness, in C; compiled when they are needed
    networks                where they meet: a network namespace of their own
    processes               a running server, pinned to its core, and what the system says of it
    runner                  options, the cores, the order of turns
    pool_clients            a pool, in a process of its own
    results plots           medians, ratios, targets; table, JSON, pictures in results/

    echo bulk accept memory supervise detect workers pool import_time     one question each

Rules kept here: all contenders take turns in one run, in an order that changes, and a ratio is taken within a round, so
that what the machine does meanwhile befalls all. Server and load are on a core each. What is compared is the CPU time
of the server's process, user and system, as the scheduler accounts for it in nanoseconds. What the servers did is
checked for correctness, outside the timed part. Nothing else should run on the machine.
"""
