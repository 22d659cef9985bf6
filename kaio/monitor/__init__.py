"""What watches: the monitor of a loop, the sweep of a process, and who watches what.

owners        which sockets of this process a monitor watches, also to be read from outside
deadline      the kernel's user timeout where no loop watches: lifted while a peer is stalled and answers
survey        all TCP sockets of this process: a report, and a sweep that gives them the policy
sweeper       the sweep of `kaio run`, again and again
counters      what has happened, as plain data
watched       the seam: what the monitor needs of a connection
wheel         who is looked at when
error_watch   errors of connections that the loop does not listen to
death_log     the log record of each death
timeouts      connections that end because nothing comes, or nothing that was sent is taken
heartbeats    signs of life of the far application
monitor       one for each loop, made of these
"""
