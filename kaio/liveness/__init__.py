"""Judgement: how a peer is, when to give it up, and whose options a socket has.

health     alive, suspect, stalled or dead, by one sample of TCP_INFO
limits     the times by which a connection is watched
watch      health over time: what a look remembers, and what is to be done next
pulse      when the far application is asked for a sign of life, and given up
causes     which errors are deaths, and of what
sample     the health of any socket
standing   whose options a socket has
"""
