"""Starts a job's script in a copy of the run's warm process (`headgram.run.forkserver`), or by itself where there is none.

    python -I -S start_job.py SCRIPT ARGUMENT...

Every job begins here, so it imports little of the standard library and nothing else: it takes a hundredth of a second.
"""

import contextlib
import json
import os
import socket
import struct
import sys

#: Names the server's socket, in the environment of jobs.
ADDRESS = "HEADGRAM_FORKSERVER"
STARTED = b"s"
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def hand_over(arguments: list[str]) -> None:
    """Let the server run a script with arguments, if there is one: then this does not return.

    Raises
    ------
    SystemExit
        When the script has ended; with its exit code.
    """
    address = os.environ.pop(ADDRESS, None)
    if address is None:
        return
    status = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        try:
            server.connect(f"\0{address}")
            if not is_same_user(server):
                return  # the server is gone, and somebody took its name
            request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109
            socket.send_fds(server, [b"-"], [0, 1, 2])
            server.sendall(json.dumps(request).encode() + b"\n")
            started = server.recv(1)
        except OSError:
            return  # it is gone; nothing has begun
        if started != STARTED:
            return
        with contextlib.suppress(ConnectionResetError):
            status = server.recv(1)
    if not status:
        sys.exit("headgram: the job was killed, perhaps because memory ran out; run the same command again")
    sys.exit(status[0])


def is_same_user(peer: socket.socket) -> bool:
    """Whether the other side is the same user: the name of an abstract socket is known to all, and has no permissions."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.getuid())


if __name__ == "__main__":
    hand_over(sys.argv[1:])
    os.execv(sys.executable, [sys.executable, "-P", *sys.argv[1:]])
