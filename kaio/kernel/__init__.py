"""What the kernel reports and accepts: no event loop, no judgement.

tcpinfo       struct tcp_info, decoded
options/      reading and setting the keepalive options, one file for each platform
sockets       `apply` and `inspect`, for any object that has a TCP socket
queues        what any socket has received, or sent, and nobody has taken
filters       what a socket's kernel does not let it receive
descriptors   a file descriptor of this process as a socket, whoever opened it
"""
