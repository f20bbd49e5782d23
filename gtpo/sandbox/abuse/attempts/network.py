"""Every family of sockets."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts.attempt import REFUSALS, refused

ATTEMPTS = refused(
    "network",
    {
        "tcp": "import socket\nsocket.create_connection(('127.0.0.1', $PORT), 1)",
        "tcp6": "import socket\nsocket.socket(socket.AF_INET6)",
        "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', $PORT))",
        "listen": "import socket\nsocket.create_server(('127.0.0.1', 0))",
        "raw": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        "packet": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "vsock": "import socket\nsocket.socket(socket.AF_VSOCK)",
        "kernel_crypto": "import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
        "unix": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0gtpo')",
        "bluetooth": "import socket\nsocket.socket(31, socket.SOCK_RAW)",
        "multipath_tcp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)",
        "dns": "import socket\nsocket.getaddrinfo('example.com', 80)",
        "urllib": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:$PORT')",
        "socket_of_the_keeper": "import socket\nsocket.socket(fileno=3).send(b'x')",
    },
    (*REFUSALS, "socket.gaierror", "urllib.error.URLError"),
)
