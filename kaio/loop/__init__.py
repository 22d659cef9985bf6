"""The drop-in event loop: any base's loop, with the policy for every TCP socket of it, whoever opens it.

foreign     other libraries' connections, as the monitor knows them
coverage    the sockets of one loop: the policy, and registration with the monitor
covering    the methods that cover a base's loop, and the class made of both
factories   the public functions: loop_factory, run, install
"""
