"""What the commands do, as functions: sockets of processes, the kernel's defaults, source code, plans.

procfs         what /proc says of any process
cgroups        control groups: where they are mounted, whose is whose
locks          of files and directories, between commands
sysctls/       the kernel's defaults for keepalive: now, and over a reboot
plans          what a policy means
middleboxes    what forgets a silent connection, and after how long
kernel_policy  a policy as the kernel alone enforces it: with all times
sockdiag/      connections as the kernel lists them
processes/     sockets of running processes, and a policy for them
bpf/           kernel programs: assembling, loading and attaching them
enforcing/     a policy for all sockets of a unit, a cgroup or the machine, set by the kernel
running/       starting a program for `kaio exec`, and staying its parent
audit/         what source code leaves uncovered
workers/       the supervisor of `kaio serve`, and its workers
bootstrap      what `kaio run` does inside the program that it runs; _bootstrap/ is on that program's path
"""
