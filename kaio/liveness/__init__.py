"""Judgement: what is to be thought of a peer, and whose options a socket has.

health     alive, suspect, stalled or dead, by one sample; limits and causes
watch      the same over time: what a look remembers, and what is to be done next
standing   whose options a socket has
"""
