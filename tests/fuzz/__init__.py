"""Random input for everything that kaio parses: `make fuzz`, or `python -m tests.fuzz --minutes 10`.

    search     what a property is, and the search for an example that breaks it
    inputs     random bytes and text that resemble what a parser expects; input that grows
    files      files that a module finds when it opens them: what /proc would say
    proc       /proc: names, descriptors, status; the cgroups
    processes  parents, names, units, environments; what kaio has set on sockets
    netlink    the kernel's list of connections, and struct tcp_info
    types      the kernel's type information (BTF)
    settings   the files of sysctl.d(5), and the values in /proc/sys
    texts      policies, times, addresses
    headers    the PROXY protocol
    tables     the table of the sockets that a monitor watches
    run        the command

Four things are asked of every parser: it returns a result or raises the errors that it documents, and no others; what
the kernel or kaio has written is read as it was meant; time grows no faster than the input; what was parsed and written
again is the same. `tests/test_fuzz.py` runs each property for a moment, and has what was found.
"""
