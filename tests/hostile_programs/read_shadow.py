"""Reads the host's passwords."""


def add(a, b):
    with open("/etc/shadow") as file:
        return a + b if file.read() else 0
