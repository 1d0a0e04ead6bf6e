"""Preloaded by the process that data workers are forked from, and by nothing else: importing this ignores signals.

Schedulers signal every process of a job. The ranks handle that: they finish their step, commit and end their workers.
A server that died of the signal would take the workers along before.
"""

import signal

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)

import dist_ssl.data.stream  # noqa: E402, F401  what the server imports, its workers need not
