"""What watches: the monitor of a loop, the sweep of a process, and who watches what.

owners     which sockets of this process a monitor watches, also to be read from outside
deadline   the kernel's user timeout, where no loop watches: lifted while a peer is stalled and answers
survey     all TCP sockets of this process: a report, and a sweep that gives them the policy
sweeper    the sweep of `kaio run`, again and again
monitor    one per loop: looks after connections that may be in trouble
"""
