"""The drop-in event loop: any base's loop, and the policy for every TCP socket of it, whoever opens it.

foreign     other libraries' connections, as the monitor knows them
covering    what is put over a base's loop
factories   the public functions: loop_factory, run, install
"""
