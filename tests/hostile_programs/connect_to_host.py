"""Calls a server on the host's loopback interface."""

import socket


def add(a, b):
    with socket.create_connection(("127.0.0.1", int("@port@")), timeout=2) as connection:
        return a + b if connection.recv(100) else 0
