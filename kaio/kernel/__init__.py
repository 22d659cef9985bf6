"""Facts, without a loop and without an opinion: socket options, TCP_INFO, any socket, the descriptors of this process.

tcpinfo       struct tcp_info, decoded
options/      a policy as socket options, the one place that knows the platform
sockets       apply and inspect: what any socket has and gets
descriptors   a descriptor of this process as a socket, whoever opened it
"""
