"""The proof that every death is found, wherever the path breaks, and that the living are never taken for dead.

    make matrix                          all of it: places x states x loops x modes x kinds, and live peers
    python -m tests.matrix --place "our link" --state idle --kind own --loop uvloop --mode keep
    python -m tests.matrix --live        live peers that look dead, only

The modules, from the ground up:

    cells      what a cell of the matrix is, and what was seen in it
    places     where the path breaks: one act each, in a network of a client, a router and a server
    states     what a connection was doing when it broke, and what is done with it just afterwards
    expect     what the contract says of each cell: by when, why, and how often it is told
    ends       our side of a connection, for each kind that an event loop has
    peers      the other side: plain sockets that know nothing of keepalive
    crowd      one process: all connections of one place, loop and mode, broken by one act
    blocking   a program with blocking sockets, and nothing of kaio's in it
    guarded    one process: that program under `kaio run` and under `kaio attach`, at one place
    live       live peers that look dead
    report     tables
"""
