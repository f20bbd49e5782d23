"""The user ids of a pool's sessions where it runs as root. The kernel counts processes by user, whosever pool it is."""

from __future__ import annotations

import errno
import random
import socket

NUM_USERS = 2**16
# What systemd's and other tables of user ids leave unused: beyond users and containers.
_FIRST, _END = 0x7000_0000, 0x7FFE_0000


def claim() -> tuple[int, socket.socket]:
    """The first of NUM_USERS ids that no other pool of this machine has while the socket is open.

    Pools in containers with a network of their own do not see each other's sockets, so the range is drawn at random.
    """
    while True:
        first = random.SystemRandom().randrange(_FIRST, _END, NUM_USERS)
        holder = socket.socket(socket.AF_UNIX)
        try:
            holder.bind(f"\0gtpo-sandbox-users-{first:x}")
            return first, holder
        except OSError as failure:
            holder.close()
            if failure.errno != errno.EADDRINUSE:
                raise
