"""What the commands do, as functions: sockets of processes, the kernel's defaults, source code, plans.

sysctls       the kernel's defaults for keepalive: now, and over a reboot
plans         what a policy means
locks         of files and directories, between commands
middleboxes   what forgets a silent connection, and after how long
processes/    sockets of running processes, and a policy for them
sockdiag/     connections as the kernel lists them
audit/        what source code leaves uncovered
workers/      the supervisor of `kaio serve`, and its workers
bootstrap     what `kaio run` does inside the program that it runs; _bootstrap/ is on that program's path
"""
